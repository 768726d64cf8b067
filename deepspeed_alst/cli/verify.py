"""``ds_alst verify``: compare training under a ds_config with training without sequence parallelism.

Runs ALST's own check (arXiv 2506.13996, section 5.4): DP = n, SP = 1, accumulation 1 against SP = n, accumulation n,
with the same samples in a step. A tensor's difference is the norm of the difference over the norm.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deepspeed_alst.cli.launch import (
    BASELINE,
    HALF_KEYS,
    builtin_config,
    configs_of,
    half_of,
    launch,
    num_gpus,
    with_file,
)
from deepspeed_alst.cli.report import read_json
from deepspeed_alst.config.config_file import check_model_file
from deepspeed_alst.core.selfcheck import SLACK
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.profiler.picture import draw_curves

_ROUNDING = "SP 1 in fp32"

Differences = dict[str, dict[str, float]]
"""Differences of two runs by kind (``KINDS``), then by step, layer or parameter, each in model order."""
_RECORD = "record-0.pt"
# Fraction of the global gradient norm below which a gradient is rounding, e.g. of a key bias, which softmax cancels.
_GRAD_NORM_FLOOR = 1e-4
# Relative difference of a gradient from its half.
_HALF = 0.5
KINDS = {
    "loss": ("loss", 1e-4, 5e-3),
    "norm": ("gradient norm", 3e-4, 3e-2),
    "layers": ("layer outputs, first sample", 3e-4, 5e-2),
    "gradients": ("gradients, first step", 3e-4, 1e-1),
    "changes": ("weight updates, all steps", 3e-3, 2e-1),
}
"""Compared quantities: name in the table, largest difference by rounding in fp32, and in half precision unless a run in
fp32 measures it."""


@dataclass(frozen=True)
class Row:
    """Comparison of one kind: the largest difference, its place and limit, and all places beyond their limits."""

    what: str
    difference: float
    place: str
    allowed: float
    missed: tuple[str, ...]
    num_hidden: int = 0
    """Number of places where rounding may hide a factor of two."""


def run(arguments: argparse.Namespace) -> int:
    """Compare the runs; return 0 if they differ by rounding only, else 1.

    Raises:
        AlstError: the comparison cannot be made.
    """
    start, program = time.monotonic(), arguments.program
    if bool(arguments.model) == bool(program):
        raise ConfigError("verify: give either --model CONFIG, or a program: -- train.py --deepspeed ds.json ...")
    check_model_file(arguments.model or "")
    world_size = arguments.num_gpus or num_gpus() or 2
    sp_size, runs = configs_of(read_json(arguments.ds_config), world_size)
    output = arguments.output.absolute()
    for name in (*runs, _ROUNDING):  # of an earlier comparison; other files stay
        shutil.rmtree(output / name, ignore_errors=True)
    if program:
        programs = {name: with_file(program, str(output / name / "ds_config.json")) for name in runs}
    else:
        runs = {name: builtin_config(ds_config, output, small=not arguments.full) for name, ds_config in runs.items()}
        if half_of(runs[BASELINE]) and not arguments.full:
            left_out = (*HALF_KEYS, "data_types")
            runs[_ROUNDING] = {key: value for key, value in runs[BASELINE].items() if key not in left_out}
    for name, ds_config in runs.items():
        (output / name).mkdir(parents=True)
        (output / name / "ds_config.json").write_text(json.dumps(ds_config, indent=1))
    trial = ["--module", "deepspeed_alst.cli.trial"]
    if program:
        for name, words in programs.items():
            launch([*trial, str(output / name), str(arguments.steps), *words], world_size, output / f"{name}.log")
    else:
        spec = {key: value for key, value in vars(arguments).items() if key != "output"}
        (output / "spec.json").write_text(json.dumps(spec | {"runs": list(runs)}))
        launch([*trial, str(output)], world_size, output / "run.log")
    rows = judge(output, *runs, sp_size=sp_size)
    summary = f"{world_size} ranks; {arguments.steps} steps; {time.monotonic() - start:.0f} s"
    return show(rows, output, list(runs), summary)


def judge(output: Path, whole: str, split: str, *others: str, sp_size: int = 1) -> list[Row]:
    """Compare the split run in ``output`` with the whole one; a third run, in fp32, measures rounding."""
    found = differences(output / split, output / whole, sp_size)
    rounding = differences(output / whole, output / others[0], 1) if others else None
    half = bool(half_of(json.loads((output / split / "ds_config.json").read_text())))
    rows = []
    for kind, (words, *_) in KINDS.items():
        values = {place: math.inf if math.isnan(value) else value for place, value in found[kind].items()}
        limits = {place: allowed(kind, place, half, rounding) for place in values}
        missed = tuple(place for place, value in values.items() if value > limits[place])
        # The largest difference may be allowed where a smaller one is not.
        place = max(missed or values, key=values.__getitem__, default="")
        num_hidden = sum(limit > _HALF for limit in limits.values())
        rows.append(Row(words, found[kind].get(place, 0.0), place, limits.get(place, 0.0), missed, num_hidden))
    return rows


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def differences(run: Path, truth: Path, sp_size: int) -> Differences:
    """Return the differences of a run of ``sp_size`` ranks per sequence from one without, on the same samples."""
    ranks, reference = [_load(run / f"record-{rank}.pt") for rank in range(sp_size)], _load(truth / _RECORD)
    found: Differences = {}
    for kind in ("loss", "norm"):
        steps = enumerate(zip(ranks[0][kind], reference[kind], strict=True), start=1)
        # DeepSpeed has no norm at stage 0 in fp32.
        found[kind] = {f"step {step}": abs(a - b) / abs(b) for step, (a, b) in steps if None not in (a, b)}
    split, found["layers"] = _outputs(ranks), {}
    for name, tokens in _outputs([reference]).items():
        # Only one of the runs has padding, and each samples its own tokens of a long sequence.
        common = sorted(tokens.keys() & split.get(name, {}).keys())
        if common:
            a, b = (torch.stack([each[place] for place in common]) for each in (split[name], tokens))
            found["layers"][name] = float((a - b).norm() / b.norm()) if a.shape == b.shape else math.inf
    for kind in ("gradients", "changes"):
        ours, theirs = ranks[0][kind], reference[kind]
        floor = _GRAD_NORM_FLOOR * math.sqrt(sum(float(each.norm()) ** 2 for each in theirs.values()))
        found[kind] = {
            name: float((ours[name] - their).norm()) / max(float(their.norm()), floor) for name, their in theirs.items()
        }
    return found


def _outputs(ranks: list[dict[str, Any]]) -> dict[str, dict[int, torch.Tensor]]:
    """Return layer outputs ``[batch, hidden]`` by layer and by position in the whole sequence."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank, record in enumerate(ranks):
        for name, (stride, s, outputs) in record["layers"].items():
            places = range(rank * s, (rank + 1) * s, stride)
            found.setdefault(name, {}).update(zip(places, outputs.unbind(1), strict=True))
    return found


def allowed(kind: str, place: str, half: bool, rounding: Differences | None) -> float:
    """Return the largest difference that counts as rounding, of a kind at a step, layer or parameter.

    ``rounding`` are the differences of a half-precision run without sequence parallelism from the same run in fp32.
    """
    if rounding is None:
        return KINDS[kind][2 if half else 1]
    values = rounding[kind]
    # A scalar or a parameter of few elements may agree by chance, and curves cross.
    usual = (max if kind in ("loss", "norm") else statistics.median)(values.values() or [0.0])
    # Each of the two half-precision runs deviates by about the measured rounding.
    return max(SLACK * max(values.get(place, 0.0), usual), KINDS[kind][1])


def first_difference(rows: list[Row]) -> str:
    """Describe the first difference: forward in layer order, then backward in reverse order; empty if none."""
    missed = {row.what: row.missed for row in rows}
    if layers := missed[KINDS["layers"][0]]:
        return f"The first layer whose output differs is {layers[0]}."
    if gradients := missed[KINDS["gradients"][0]]:
        return f"All layer outputs agree; in the backward, {gradients[-1]} is the first to differ."
    return ""


def show(rows: list[Row], output: Path, names: list[str], summary: str) -> int:
    """Print the table, write ``verify.json`` and ``loss.png``; return 1 if any difference exceeds rounding."""
    records = {name: _load(output / name / _RECORD) for name in names}
    curves, title = (
        {name: record["loss"] for name, record in records.items()},
        f"{names[1]} against {names[0]}: {summary}",
    )
    table = Table(title=title)
    for column in ("", "largest difference", "where", "rounding", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        if not row.place:
            table.add_row(row.what, "-", "-", "-", "not compared: missing in a run")
            continue
        verdict = f"{len(row.missed)} DIFFER" if row.missed else "ok"
        verdict += f", {row.num_hidden} hidden by rounding" if row.num_hidden else ""
        table.add_row(row.what, f"{row.difference:.1e}", row.place, f"<= {row.allowed:.1e}", verdict)
    # A log file has no width, and names of layers must not be folded.
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for name, losses in curves.items():
        console.print(f"loss, {name}: " + " ".join(f"{loss:.5f}" for loss in losses))
    if place := first_difference(rows):
        console.print(place)
    if any(row.num_hidden for row in rows):
        console.print("To compare what rounding hides, verify a copy of the ds_config without bf16 or fp16.")
    (output / "verify.json").write_text(json.dumps({"rows": [asdict(row) for row in rows], "loss": curves}, indent=1))
    try:
        norms = {name: record["norm"] for name, record in records.items() if None not in record["norm"]}
        charts = {"loss, nats per token": curves, "gradient norm, before clipping": norms}
        draw_curves(title, {quantity: runs for quantity, runs in charts.items() if runs}, str(output / "loss.png"))
        files = "verify.json and loss.png"
    except ImportError:
        files = "verify.json (a plot needs pip install matplotlib)"
    console.print(f"Results: {files} in {output}")
    return int(any(row.missed for row in rows))

"""Verdict of ``ds_alst verify``: relative differences between two recorded runs, and what of them is rounding.

A tensor's difference is the norm of the difference over the norm. Legend: P = sp_size, H hidden.
"""

import json
import math
import os
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from deepspeed_alst.profiler.picture import draw_curves

Differences = dict[str, dict[str, float]]
"""Differences of two runs by kind (``KINDS``), then by step, layer or parameter, each in model order."""
_RECORD = "record-0.pt"
# Fraction of the global gradient norm below which a gradient is rounding, e.g. of a key bias, which softmax cancels.
_NOTHING = 1e-4
# Each of the two half-precision runs deviates by about the measured rounding.
_SLACK = 3.0
# Relative difference of a gradient from its half.
_TELLING = 0.5
KINDS = {
    "loss": "loss",
    "norm": "gradient norm",
    "layers": "layers' outputs, first sample",
    "gradients": "gradients, first step",
    "changes": "weights' change, all steps",
}
"""Compared quantities and their names in the table."""
# Differences up to these are rounding: in fp32, and in half precision without a run in fp32 to measure it.
FP32 = {"loss": 1e-4, "norm": 3e-4, "layers": 3e-4, "gradients": 3e-4, "changes": 3e-3}
HALF = {"loss": 5e-3, "norm": 3e-2, "layers": 5e-2, "gradients": 1e-1, "changes": 2e-1}


@dataclass(frozen=True)
class Row:
    """One kind of difference."""

    what: str
    difference: float
    place: str
    allowed: float
    missed: tuple[str, ...]
    """Places where the difference exceeds rounding, in model order."""
    num_hidden: int = 0
    """Number of places where rounding may hide a factor of two."""


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def judge(output: Path, whole: str, split: str, *others: str, sp_size: int = 1) -> list[Row]:
    """Compare the split run in ``output`` with the whole one; a third run, in fp32, measures rounding."""
    found = differences(output / split, output / whole, sp_size)
    rounding = differences(output / whole, output / others[0], 1) if others else None
    keys = json.loads((output / split / "ds_config.json").read_text())
    half = any((keys.get(dtype) or {}).get("enabled") for dtype in ("bf16", "fp16"))
    rows = []
    for kind, words in KINDS.items():
        limits = {place: allowed(kind, place, half, rounding) for place in found[kind]}
        # `value > limit` would miss NaN.
        missed = tuple(place for place, value in found[kind].items() if not value <= limits[place])
        # The largest difference may be allowed where a smaller one is not.
        shown = {place: found[kind][place] for place in missed or found[kind]}
        place = max(shown, key=lambda name: math.inf if math.isnan(shown[name]) else shown[name], default="")
        num_hidden = sum(limit > _TELLING for limit in limits.values())
        rows.append(Row(words, shown.get(place, 0.0), place, limits.get(place, 0.0), missed, num_hidden))
    return rows


def differences(run: Path, truth: Path, sp_size: int) -> Differences:
    """Return the differences of a run of ``sp_size`` ranks per sequence from one without, on the same samples."""
    ranks, reference = [_load(run / f"record-{rank}.pt") for rank in range(sp_size)], _load(truth / _RECORD)
    found = {
        kind: {
            f"step {step}": abs(a - b) / abs(b)
            for step, (a, b) in enumerate(zip(ranks[0][kind], reference[kind], strict=True), start=1)
            if a is not None and b is not None  # DeepSpeed has no norm at stage 0 in fp32
        }
        for kind in ("loss", "norm")
    }
    split, found["layers"] = _outputs(ranks), {}
    for name, tokens in _outputs([reference]).items():
        # Only one of the runs has padding, and each samples its own tokens of a long sequence.
        common = sorted(tokens.keys() & split.get(name, {}).keys())
        if common:
            a, b = (torch.stack([each[place] for place in common]) for each in (split[name], tokens))
            found["layers"][name] = float((a - b).norm() / b.norm()) if a.shape == b.shape else math.inf
    for kind in ("gradients", "changes"):
        ours, theirs = ranks[0][kind], reference[kind]
        floor = _NOTHING * math.sqrt(sum(float(each.norm()) ** 2 for each in theirs.values()))
        found[kind] = {
            name: float((ours[name] - their).norm()) / max(float(their.norm()), floor) for name, their in theirs.items()
        }
    return found


def _outputs(ranks: list[dict[str, Any]]) -> dict[str, dict[int, torch.Tensor]]:
    """Return layer outputs ``[B, H]`` by layer and by position in the whole sequence."""
    found: dict[str, dict[int, torch.Tensor]] = {}
    for rank, record in enumerate(ranks):
        for name, (stride, s, outputs) in record["layers"].items():
            places = range(rank * s, (rank + 1) * s, stride)
            found.setdefault(name, {}).update(zip(places, outputs.unbind(1), strict=True))
    return found


def allowed(kind: str, place: str, half: bool, rounding: Differences | None) -> float:
    """Return the largest difference that counts as rounding.

    Args:
        kind: one of ``KINDS``.
        place: a step, layer or parameter.
        half: True if the runs are in bf16 or fp16.
        rounding: differences of a run without sequence parallelism from the same run in fp32.
    """
    if rounding is None:
        return (HALF if half else FP32)[kind]
    values = rounding[kind]
    # A scalar or a parameter of few elements may agree by chance, and curves cross.
    usual = (max if kind in ("loss", "norm") else statistics.median)(values.values() or [0.0])
    return max(_SLACK * max(values.get(place, 0.0), usual), FP32[kind])


def first_difference(rows: list[Row]) -> str:
    """Describe the first difference: forward in layer order, then backward in reverse order."""
    missed = {row.what: row.missed for row in rows}
    if layers := missed[KINDS["layers"]]:
        return f"The first layer whose output differs is {layers[0]}."
    if gradients := missed[KINDS["gradients"]]:
        return f"All layers' outputs agree; in the backward, {gradients[-1]} is the first to differ."
    return ""


def show(rows: list[Row], output: Path, names: list[str], lengths: str) -> int:
    """Print the table, write ``verify.json`` and ``loss.png``; return 1 if any difference exceeds rounding."""
    curves = {name: _load(output / name / _RECORD)["loss"] for name in names}
    table = Table(title=f"{names[1]} against {names[0]}: {lengths}")
    for column in ("", "largest difference", "where", "rounding", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        if not row.place:
            table.add_row(row.what, "-", "-", "-", "not compared: a run has none")
            continue
        verdict = f"{len(row.missed)} DIFFER" if row.missed else "ok"
        verdict += f", {row.num_hidden} hidden by rounding" if row.num_hidden else ""
        table.add_row(row.what, f"{row.difference:.1e}", row.place, f"<= {row.allowed:.1e}", verdict)
    console = Console()
    console.print(table)
    for name, losses in curves.items():
        console.print(f"loss, {name}: " + " ".join(f"{loss:.5f}" for loss in losses))
    if place := first_difference(rows):
        console.print(place)
    (output / "verify.json").write_text(json.dumps({"rows": [asdict(row) for row in rows], "loss": curves}, indent=1))
    if any(row.num_hidden for row in rows):
        console.print("What rounding hides is seen in fp32: verify a copy of the file without bf16 or fp16.")
    try:
        draw_curves(curves, str(output / "loss.png"))
        files = "loss.png and verify.json"
    except ImportError:
        files = "(no picture: pip install matplotlib) verify.json"
    console.print(f"{files} are in {os.path.relpath(output)}")
    return int(any(row.missed for row in rows))

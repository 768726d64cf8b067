"""Verdict of ``ds_alst verify`` on two runs: a table, a plot and the first difference."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepspeed_alst.cli.compare import KINDS, Differences, allowed, differences

# Relative difference of a gradient from its half.
_TELLING = 0.5


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


def judge(output: Path, whole: str, split: str, *others: str, sp_size: int = 1) -> list[Row]:
    """Compare the split run in ``output`` with the whole one; a third run, in fp32, measures rounding."""
    found = differences(output / split, output / whole, sp_size)
    rounding = differences(output / whole, output / others[0], 1) if others else None
    half = _is_half(output, split)
    rows = []
    for kind, words in KINDS.items():
        limits = {place: allowed(kind, place, half, rounding) for place in found.by_kind[kind]}
        # `value > limit` would miss NaN.
        missed = tuple(place for place, value in found.by_kind[kind].items() if not value <= limits[place])
        value, place = _worst(found, kind, missed)
        num_hidden = sum(limit > _TELLING for limit in limits.values())
        rows.append(Row(words, value, place, limits.get(place, 0.0), missed, num_hidden))
    return rows


def _worst(found: Differences, kind: str, missed: tuple[str, ...]) -> tuple[float, str]:
    worst, place = found.worst(kind)
    # The largest difference may be allowed where a smaller one is not.
    return (worst, place) if not missed or place in missed else (found.by_kind[kind][missed[0]], missed[0])


def _is_half(output: Path, split: str) -> bool:
    spec, ds_config = output / "spec.json", output / split / "ds_config.json"
    if spec.exists():
        return bool(json.loads(spec.read_text())["half"])
    keys = json.loads(ds_config.read_text())
    return any((keys.get(dtype) or {}).get("enabled") for dtype in ("bf16", "fp16"))


def first_difference(rows: list[Row]) -> str:
    """Describe the first difference: forward in layer order, then backward in reverse order."""
    by_name = {row.what: row.missed for row in rows}
    if layers := by_name[KINDS["layers"]]:
        return f"The first layer whose output differs is {layers[0]}."
    if gradients := by_name[KINDS["gradients"]]:
        return f"All layers' outputs agree; in the backward, {gradients[-1]} is the first to differ."
    return ""


def show(rows: list[Row], output: Path, names: list[str], lengths: str) -> int:
    """Print the table, write ``verify.json`` and ``loss.png``; return 1 if any difference exceeds rounding."""
    curves = {name: json.loads((output / name / "record.json").read_text())["loss"] for name in names}
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
    console.print(f"{_picture(curves, output)}verify.json are in {os.path.relpath(output)}")
    return int(any(row.missed for row in rows))


def _picture(curves: dict[str, list[float]], output: Path) -> str:
    try:
        from deepspeed_alst.cli.picture import draw_curves
    except ImportError:
        return "(no picture: pip install matplotlib) "
    draw_curves(curves, str(output / "loss.png"))
    return "loss.png and "

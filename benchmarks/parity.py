"""Is a run with the sequence split over ranks as exact as the run without? ``make parity`` prints the table.

Every cell trains a small Llama, or another model, for three SGD steps: with SP 1, with this package, with DeepSpeed's
own ALST, and in fp64 plain torch. An error is relative to fp64: of the loss and the norm; of the worst named
parameter's gradient; of the worst named parameter's change over the three steps. This package may make twice the error
of SP 1, per parameter, with a floor of 1e-6; for the norm, twice what SP 1's errors in the parameters' norms amount to,
if that is more. Exit status 1 if a cell is missed.
"""

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import resume
from benchmarks.cells import STEPS, Cell, Result, run_alst, run_interpreted, run_sp1, run_truth, run_upstream
from benchmarks.families import KINDS, LINEAR_FAMILIES
from benchmarks.grid import kernel_cells, model_cells, pairwise_cells, product_cells, short_cells
from benchmarks.ranks import RankError, Ranks, interpreted_ranks
from benchmarks.trainer import run_trainer, run_trainer_truth, trainer_cells

SLACK = 2.0
FLOOR = 1e-6
# A change below this share of the weight's norm would hide a wrong step behind the weight.
VISIBLE_CHANGE = 0.05


@dataclass(frozen=True)
class Errors:
    """Relative errors of a run against fp64."""

    loss: float
    norm: float | None
    grads: dict[str, float]
    changes: dict[str, float]
    norm_scale: float
    """How large the norm's error is expected to be, from the errors of the parameters' own norms."""


def errors(result: Result, truth: Result) -> Errors:
    """Relative errors of every kind."""

    def each(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
        return {name: float((ours[name] - true).norm() / true.norm()) for name, true in theirs.items()}

    return Errors(
        loss=abs(result.loss - truth.loss) / truth.loss,
        norm=None if result.norm is None else abs(result.norm - truth.norm) / truth.norm,
        grads=each(result.grads, truth.grads),
        changes=each(result.changes, truth.changes),
        norm_scale=_norm_scale(result, truth),
    )


def _norm_scale(result: Result, truth: Result) -> float:
    """The norm's relative error if the parameters' norms err independently.

    One number can be right by luck (in bf16, 1e-5 where 1e-3 is usual), so its own error at SP 1 is no yardstick alone.
    """
    whole = sum(float(true.square().sum()) for true in truth.grads.values())
    offs = [float(result.grads[name].square().sum() - true.square().sum()) for name, true in truth.grads.items()]
    return math.sqrt(sum(off * off for off in offs)) / (2 * whole)


def missed(ours: Errors, sp1: Errors, by_luck: bool = False) -> list[str]:
    """Which bounds a run misses, with its error and the bound.

    The few elements of a norm weight, or of a scan's decay, can be right by luck. Where each run draws its errors anew
    (``sums`` bf16 or fp16), or such parameters are many (other models than the Llama), a parameter's yardstick is the
    median of all parameters' at least.
    """
    least = [statistics.median(each.values()) if by_luck else 0.0 for each in (sp1.grads, sp1.changes)]
    pairs = {"loss": (ours.loss, sp1.loss)}
    if sp1.norm is not None:
        pairs["norm"] = (float("nan") if ours.norm is None else ours.norm, max(sp1.norm, sp1.norm_scale))
    pairs |= {f"gradient of {name}": (error, max(least[0], sp1.grads[name])) for name, error in ours.grads.items()}
    pairs |= {f"change of {name}": (error, max(least[1], sp1.changes[name])) for name, error in ours.changes.items()}
    # Not `error > bound`: NaN must miss.
    return [
        f"{what}: {error:.2e} > {max(SLACK * yardstick, FLOOR):.2e}"
        for what, (error, yardstick) in pairs.items()
        if not error <= max(SLACK * yardstick, FLOOR)
    ]


@dataclass(frozen=True)
class Row:
    """A cell's errors; a run that could not be made has its reason instead."""

    cell: Cell
    sp1: Errors | str
    alst: Errors | str
    upstream: Errors | str
    least_change: float
    program: str = ""
    others: tuple["Row", ...] = ()
    """The same cell with other samples, where it missed."""

    def name(self) -> str:
        """The program, where it is not a plain loop, and the cell."""
        return f"{self.program} {self.cell.name()}".strip()

    def problems(self) -> list[str]:
        """Why the cell is missed; empty if it is met, or DeepSpeed refuses it at SP 1 too.

        With other samples beside it, what most of the runs miss counts: one run of SP 1 is a yardstick with luck in
        it, and a wrong sum is wrong with any samples.
        """
        if isinstance(self.sp1, str):
            return []
        runs = (self, *self.others)
        if failed := [run.alst for run in runs if isinstance(run.alst, str)]:
            return failed
        bounds = [bound for run in runs for bound in run.bounds_missed()]
        counts = Counter(bound.split(":")[0] for bound in bounds)
        faint = [f"a weight moved by {self.least_change:.1%} only"] if self.least_change < VISIBLE_CHANGE else []
        return [bound for bound in bounds if 2 * counts[bound.split(":")[0]] > len(runs)] + faint

    def bounds_missed(self) -> list[str]:
        """Those of its own samples alone; none where a run could not be made."""
        if isinstance(self.sp1, str) or isinstance(self.alst, str):
            return []
        return missed(self.alst, self.sp1, bool(self.cell.sums or self.cell.model))


def measure(cell: Cell, ranks: Ranks, with_upstream: bool = True) -> Row:
    """Run a cell in all its forms, as a plain loop."""
    truth = run_truth(cell)
    upstream = _errors_of(ranks, truth, run_upstream, cell) if with_upstream and _has_upstream(cell) else "not run"
    runs = (run_sp1, run_interpreted if cell.loss else run_alst)
    sp1, alst = (_errors_of(ranks, truth, function, cell) for function in runs)
    return Row(cell, sp1, alst, upstream, _least_change(truth))


def _has_upstream(cell: Cell) -> bool:
    # It has no kernels for a tile's loss, and shares attention only.
    return not cell.loss and KINDS.get(cell.model, ("",))[0] not in LINEAR_FAMILIES


def measure_trainer(cell: Cell, ranks: Ranks) -> Row:
    """Run a cell by the HF Trainer, whose ds_config alone says what the SP degree is."""
    truth = run_trainer_truth(cell)
    sp1, alst = (_errors_of(ranks, truth, run_trainer, cell, sp_size) for sp_size in (1, cell.sp_size))
    return Row(cell, sp1, alst, "not run", _least_change(truth), "HF Trainer")


def _errors_of(ranks: Ranks, truth: Result, function: Any, *args: Any) -> Errors | str:
    try:
        return errors(ranks.run(function, *args)[0], truth)
    except RankError as error:
        return str(next((each for each in error.errors if each), error)).splitlines()[0][:100] or "failed"


def _least_change(truth: Result) -> float:
    return min(float(truth.changes[name].norm() / truth.before[name].norm()) for name in truth.changes)


_KINDS = {"loss": "loss", "grads": "worst gradient", "norm": "norm", "changes": f"worst change, {STEPS} steps"}
# Of the samples of a missed cell's further runs.
_OTHER_SEEDS = (1, 2)
# DeepSpeed's own ALST is called wrong where it is off by more than rounding could be, in any dtype.
_WRONG = 0.25


def _cell_texts(row: Row) -> list[str]:
    """One text for each kind of error, one line for each run."""

    def text(run: Errors | str, kind: str) -> str:
        if isinstance(run, str) or (value := getattr(run, kind)) is None:
            return "-"
        return f"{max(value.values()) if isinstance(value, dict) else value:.1e}"

    return ["\n".join(text(run, kind) for run in (row.sp1, row.alst, row.upstream)) for kind in _KINDS]


def _is_wrong(run: Errors | str) -> bool:
    """Off by more than rounding, in the loss or any parameter; NaN counts."""
    if isinstance(run, str):
        return False
    return not max(run.loss, *run.grads.values(), *run.changes.values()) < _WRONG or math.isnan(run.loss)


def run_cells(cells: list[Cell], trainers: list[Cell]) -> list[Row]:
    """Measure all cells, those of one world size in the same processes."""
    rows = []
    jobs = [(measure, cell) for cell in cells] + [(measure_trainer, cell) for cell in trainers]
    for world_size, interpreted in sorted({(cell.world_size, bool(cell.loss)) for _, cell in jobs}):
        with interpreted_ranks(world_size) if interpreted else Ranks(world_size) as ranks:
            for run, cell in jobs:
                if (cell.world_size, bool(cell.loss)) != (world_size, interpreted):
                    continue
                row = run(cell, ranks)
                if row.bounds_missed():
                    others = (run(dataclasses.replace(cell, seed=seed), ranks) for seed in _OTHER_SEEDS)
                    row = dataclasses.replace(row, others=tuple(others))
                rows.append(row)
                print(f"{len(rows)}/{len(jobs)} {rows[-1].name()}: {_verdict(rows[-1])}", file=sys.stderr, flush=True)
    return rows


def _verdict(row: Row) -> str:
    if isinstance(row.sp1, str):
        return f"refused by DeepSpeed at SP 1 too: {row.sp1}"
    if problems := row.problems():
        return "; ".join(problems[:2])
    luck = row.bounds_missed()
    return f"ok with most samples; missed with the first: {luck[0]}" if luck else "ok"


def main() -> int:
    """Print the table; 1 if a cell is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="only the cells of the tests")
    short = parser.parse_args().short
    cells = short_cells() if short else product_cells() + pairwise_cells()
    cells += kernel_cells()[:1] if short else kernel_cells() + model_cells()
    start = time.monotonic()
    rows = run_cells(cells, trainer_cells()[:2] if short else trainer_cells())
    table = Table(title=f"Relative errors against fp64, {len(rows)} cells", show_lines=True)
    for column in ("cell", "run", *_KINDS.values(), "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        upstream = "DeepSpeed's ALST: wrong" if _is_wrong(row.upstream) else "DeepSpeed's ALST"
        if isinstance(row.upstream, str):
            upstream = f"DeepSpeed's ALST: {row.upstream}"
        table.add_row(row.name(), f"SP 1\nthis package\n{upstream}", *_cell_texts(row), _verdict(row))
    console = Console(width=150)
    console.print(table)
    missed_resumes = [] if short else resume.measure(console)[1]
    bad = sum(bool(row.problems()) for row in rows)
    wrong = sum(_is_wrong(row.upstream) for row in rows)
    failed = sum(isinstance(row.upstream, str) for row in rows)
    console.print(
        f"this package: {len(rows) - bad} of {len(rows)} cells within {SLACK:g} x the error of SP 1 (target: all)\n"
        f"DeepSpeed's own ALST: {wrong} off by more than {_WRONG:.0%}, {failed} not run\n"
        f"resumed runs that miss their target: {len(missed_resumes)} (target: 0)\n"
        f"{time.monotonic() - start:.0f} s"
    )
    return 1 if bad or missed_resumes else 0


if __name__ == "__main__":
    sys.exit(main())

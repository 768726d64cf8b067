"""Compare the accuracy of sequence-parallel and plain runs; ``make parity`` prints the table.

Every cell trains a tiny Llama, or another model, for three SGD steps: with SP 1, with this package, with DeepSpeed's
own ALST, and in fp64 plain torch. Errors are relative to fp64: of the loss and the norm; of the worst named parameter's
gradient; of the worst named parameter's change over the three steps. This package may have twice the error of SP 1, per
parameter, with a floor of 1e-6; for the norm, twice the error that SP 1's parameter norms imply, if larger. Exit status
1 if a cell misses.
"""

import argparse
import dataclasses
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import resume
from benchmarks.cells import STEPS, Cell, Result, run_alst, run_interpreted, run_sp1, run_truth, run_upstream
from benchmarks.families import KINDS, LINEAR_FAMILIES
from benchmarks.figures import Figure, Part, report
from benchmarks.grid import (
    grid_cells,
    image_cells,
    kernel_cells,
    lean_cells,
    model_cells,
    own_loss_cells,
    pairwise_cells,
    product_cells,
    short_cells,
    uneven_cells,
)
from benchmarks.ranks import RankError, Ranks, interpreted_ranks
from benchmarks.trainer import run_trainer, run_trainer_truth, trainer_cells

SLACK = 2.0
FLOOR = 1e-6
# A change below this share of the weight's norm would hide a wrong step.
VISIBLE_CHANGE = 0.05


@dataclass(frozen=True)
class Errors:
    """Relative errors of a run against fp64."""

    loss: float
    norm: float | None
    grads: dict[str, float]
    changes: dict[str, float]
    norm_scale: float
    """Expected error of the norm, from the errors of the parameters' own norms."""


def errors(result: Result, truth: Result) -> Errors:
    """Return relative errors of every kind."""

    def each(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
        return {name: float((ours[name] - true).norm() / true.norm()) for name, true in theirs.items()}

    return Errors(
        loss=abs((result.loss - truth.loss) / truth.loss),
        norm=None if result.norm is None else abs(result.norm - truth.norm) / truth.norm,
        grads=each(result.grads, truth.grads),
        changes=each(result.changes, truth.changes),
        norm_scale=_norm_scale(result, truth),
    )


def _norm_scale(result: Result, truth: Result) -> float:
    """Return the norm's relative error if the parameters' norms err independently.

    A single number can be accurate by chance (in bf16, 1e-5, not the usual 1e-3), so SP 1's own error is not enough.
    """
    whole = sum(float(true.square().sum()) for true in truth.grads.values())
    offs = [float(result.grads[name].square().sum() - true.square().sum()) for name, true in truth.grads.items()]
    return math.sqrt(sum(off * off for off in offs)) / (2 * whole)


def missed(ours: Errors, sp1: Errors, by_luck: bool = False) -> list[str]:
    """Return the bounds that a run misses, with its error and the bound.

    The few elements of a norm weight, or of a scan's decay, can be accurate by chance. If errors vary between runs
    (``sums`` bf16 or fp16), or such parameters are many (models other than the Llama), a parameter's reference error is
    at least the median of all.
    """
    least = [statistics.median(each.values()) if by_luck else 0.0 for each in (sp1.grads, sp1.changes)]
    pairs = {"loss": (ours.loss, sp1.loss)}
    if sp1.norm is not None:
        pairs["norm"] = (float("nan") if ours.norm is None else ours.norm, max(sp1.norm, sp1.norm_scale))
    pairs |= {f"gradient of {name}": (error, max(least[0], sp1.grads[name])) for name, error in ours.grads.items()}
    pairs |= {f"change of {name}": (error, max(least[1], sp1.changes[name])) for name, error in ours.changes.items()}
    # `not <=` instead of `>`, so that NaN misses.
    return [
        f"{what}: {error:.2e} > {max(SLACK * yardstick, FLOOR):.2e}"
        for what, (error, yardstick) in pairs.items()
        if not error <= max(SLACK * yardstick, FLOOR)
    ]


@dataclass(frozen=True)
class Row:
    """Errors of a cell; a failed run has its reason instead."""

    cell: Cell
    sp1: Errors | str
    alst: Errors | str
    upstream: Errors | str
    least_change: float
    program: str = ""
    others: tuple["Row", ...] = ()
    """The same cell with other samples, if it missed."""

    def name(self) -> str:
        """Return the program, if it is not a plain loop, and the cell."""
        return f"{self.program} {self.cell.name()}".strip()

    def problems(self) -> list[str]:
        """Return reasons for a miss; empty if met or rejected by DeepSpeed at SP 1.

        With runs on other samples, a bound counts if most runs miss it: SP 1 can be accurate by chance in one run, but
        a wrong sum is wrong with all samples.
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
        """Return the bounds missed with its own samples; empty if a run failed."""
        if isinstance(self.sp1, str) or isinstance(self.alst, str):
            return []
        return missed(self.alst, self.sp1, bool(self.cell.sums or self.cell.model or self.cell.media))


def measure(cell: Cell, ranks: Ranks, with_upstream: bool = True) -> Row:
    """Run a cell in all variants, as a plain loop."""
    truth = run_truth(cell)
    upstream = _errors_of(ranks, truth, run_upstream, cell) if with_upstream and _has_upstream(cell) else "not run"
    runs = (run_sp1, run_interpreted if cell.loss else run_alst)
    sp1, alst = (_errors_of(ranks, truth, function, cell) for function in runs)
    return Row(cell, sp1, alst, upstream, _least_change(truth))


def _has_upstream(cell: Cell) -> bool:
    # Upstream has no Triton loss kernels, shards attention layers only, and knows its own loss only.
    return not (cell.loss or cell.own or cell.media) and KINDS.get(cell.model, ("",))[0] not in LINEAR_FAMILIES


def measure_trainer(cell: Cell, ranks: Ranks) -> Row:
    """Run a cell with the HF Trainer, configured only by the ds_config."""
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
# Seeds of the samples in a missed cell's further runs.
_OTHER_SEEDS = (1, 2)
# DeepSpeed's ALST counts as wrong above this error, beyond rounding in any dtype.
_WRONG = 0.25
_CAPTION = (
    f"Relative errors against fp64, of SP 1 and of this package, which may have {SLACK:g} times SP 1's. DeepSpeed's "
    f"ALST is wrong if off by more than {_WRONG:.0%}."
)


def _is_wrong(run: Errors | str) -> bool:
    """Return True if loss or any parameter is off by more than rounding; NaN counts."""
    if isinstance(run, str):
        return False
    return not max(run.loss, *run.grads.values(), *run.changes.values()) < _WRONG or math.isnan(run.loss)


def repeated(run: Callable[[Cell, Ranks], Row], cell: Cell, ranks: Ranks) -> Row:
    """Run a cell, and with other samples too if it misses a bound."""
    row = run(cell, ranks)
    if not row.bounds_missed():
        return row
    others = (run(dataclasses.replace(cell, seed=seed), ranks) for seed in _OTHER_SEEDS)
    return dataclasses.replace(row, others=tuple(others))


def run_cells(cells: list[Cell], trainers: list[Cell]) -> Iterator[Row]:
    """Measure all cells; those of one world size share processes."""
    jobs = [(measure, cell) for cell in cells] + [(measure_trainer, cell) for cell in trainers]
    for world_size, interpreted in sorted({(cell.world_size, bool(cell.loss)) for _, cell in jobs}):
        with interpreted_ranks(world_size) if interpreted else Ranks(world_size) as ranks:
            for run, cell in jobs:
                if (cell.world_size, bool(cell.loss)) != (world_size, interpreted):
                    continue
                yield repeated(run, cell, ranks)


def _verdict(row: Row) -> str:
    if isinstance(row.sp1, str):
        return f"refused by DeepSpeed at SP 1 too: {row.sp1}"
    if problems := row.problems():
        return "; ".join(problems[:2])
    luck = row.bounds_missed()
    return f"ok with most samples; missed with the first: {luck[0]}" if luck else "ok"


def _errors_text(rows: list[Row], kind: str) -> str:
    """Format the largest error of SP 1 and of this package in some rows."""
    texts = []
    for runs in ([row.sp1 for row in rows], [row.alst for row in rows]):
        found = [getattr(run, kind) for run in runs if not isinstance(run, str)]
        found = [max(each.values()) if isinstance(each, dict) else each for each in found if each is not None]
        texts.append(f"{max(found):.1e}" if found else "-")
    return "; ".join(texts)


def figures(rows: Iterable[Row]) -> Iterator[Figure]:
    """Yield the errors of each cell, and the largest of each kind of cell."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        upstream = row.upstream if isinstance(row.upstream, str) else "wrong" if _is_wrong(row.upstream) else "right"
        texts = (*(_errors_text([row], kind) for kind in _KINDS), upstream)
        yield Figure(row.name(), texts, met=not row.problems(), verdict=_verdict(row), brief=False)
        kinds[_kind_of(row)].append(row)
    kinds["all"] = [row for each in kinds.values() for row in each]
    for name, each in kinds.items():
        met, ran = sum(not row.problems() for row in each), [row for row in each if not isinstance(row.upstream, str)]
        upstream = f"{sum(_is_wrong(row.upstream) for row in ran)} of {len(ran)} wrong" if ran else "not run"
        texts = (*(_errors_text(each, kind) for kind in _KINDS), upstream)
        # A missed cell counts once, in its own row.
        yield Figure(name, texts, "all met", verdict=f"{met} of {len(each)} met")


def _kind_of(row: Row) -> str:
    if row.cell.model or row.cell.documents:
        return "other models, packed documents"
    if row.cell.media:
        return f"images, {row.cell.dtype}"
    if row.cell.own:
        return f"own losses, {row.cell.dtype}"
    loop = "loss by Triton's and Liger's kernels" if row.cell.loss else row.program or "loop"
    return f"{loop}, {row.cell.dtype}" if row.cell.loss else f"{loop}, ZeRO {row.cell.stage}, {row.cell.dtype}"


def main() -> int:
    """Print the table; return 1 if a cell misses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="only the cells of the tests")
    short = parser.parse_args().short
    cells = short_cells() if short else product_cells() + pairwise_cells()
    cells += kernel_cells()[:1] if short else kernel_cells() + model_cells() + lean_cells()
    cells += [] if short else uneven_cells() + grid_cells()
    own = own_loss_cells()[:1] if short else own_loss_cells()
    trainers = trainer_cells()[:2] if short else trainer_cells()
    columns = (*_KINDS.values(), "DeepSpeed's ALST")
    parts = {
        "parity": Part(lambda: figures(run_cells(cells, trainers)), columns, _CAPTION),
        "own losses": Part(lambda: figures(run_cells(own, [])), columns, _CAPTION),
    }
    images = Part(lambda: figures(run_cells(image_cells(), [])), columns, _CAPTION)
    return report(__doc__, parts if short else parts | {"images": images, "resumed": resume.PART}, ())


if __name__ == "__main__":
    sys.exit(main())

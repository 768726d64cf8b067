"""Does a run that is saved and resumed end where the uninterrupted run ends? ``python -m benchmarks.resume``.

Four steps of a small Llama at SP 2 on 2 ranks, against two steps, a checkpoint, and two more in another run: with the
same SP degree, with another, and on other numbers of ranks. The same samples in the same steps everywhere. A row has
the largest relative difference of the loss and of a named parameter after the last step; the target is bit-equal where
the layout is the same, else 1e-6. Exit status 1 if a row misses it.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config
from benchmarks.ranks import RankError, Ranks

STEPS, SAVED_AFTER = 4, 2
SAMPLES = 4  # a step, over all ranks
TARGET = 1e-6
# Less would hide a wrong step behind the weight.
VISIBLE_CHANGE = 1e-2


@dataclass(frozen=True)
class Job:
    """One program: a model, its layout, its optimizer."""

    cell: Cell
    optimizer: str = "adamw"
    freeze: str = ""
    """Part of the names of parameters that do not train."""

    @classmethod
    def of(
        cls,
        stage: int,
        sp_size: int,
        world_size: int,
        optimizer: str = "adamw",
        freeze: str = "",
        extra: tuple[tuple[str, Any], ...] = (("alst", {}),),
        **cell: Any,
    ) -> "Job":
        """A job of ``SAMPLES`` samples a step, however many ranks share them.

        ``extra`` are more keys of the ds_config; the alst block is what switches the package on at SP 1, too.
        """
        gas = SAMPLES // world_size
        cell = Cell(stage=stage, sp_size=sp_size, world_size=world_size, gas=gas, extra=extra, **cell)
        return cls(cell, optimizer, freeze)

    def layout(self) -> str:
        """The SP degree and the number of ranks, in words."""
        return f"SP {self.cell.sp_size} on {self.cell.world_size} rank{'s' * (self.cell.world_size > 1)}"


@dataclass
class Outcome:
    """The mean loss of each step, and the fp32 weights before the first and after the last."""

    losses: list[float]
    before: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def step_samples(step: int, vocab: int) -> list[dict[str, torch.Tensor]]:
    """The samples of a step, in the order of the data set; lengths differ."""
    make = torch.Generator().manual_seed(step)
    ids = [torch.randint(0, vocab, (1, 40 + 8 * (each % 3)), generator=make) for each in range(SAMPLES)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def build_engine(job: Job, from_scratch: bool = True) -> Any:
    """The job's engine, on every rank. A run that starts doubles its frozen weights: a checkpoint must bring them."""
    import deepspeed

    model = build_model(model_config(job.cell))
    for name, param in model.named_parameters():
        if job.freeze and job.freeze in name:
            param.requires_grad_(False)
            param.data *= 2 if from_scratch else 1
    trained = [param for param in model.parameters() if param.requires_grad]
    # Two groups with settings of their own, as the HF Trainer makes them.
    groups = [
        {"params": [param for param in trained if param.dim() > 1], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [param for param in trained if param.dim() == 1], "lr": 3e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups) if job.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job.cell, job.cell.sp_size))[0]


def micro_batches(engine: Any, step: int, vocab: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of a step."""
    import deepspeed_alst

    own = step_samples(step, vocab)[dist.get_rank() :: dist.get_world_size()]
    return iter(deepspeed_alst.shard_dataloader(own, engine))


def train_step(engine: Any, step: int, vocab: int) -> float:
    """One optimizer step; the mean loss of its samples."""
    losses = []
    for batch in micro_batches(engine, step, vocab):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().double())
    mean = torch.stack(losses).mean()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter, whole."""
    return {name: full_weight(param) for name, param in engine.module.named_parameters()}


def run(job: Job, first: int, last: int, load: str | None = None, save: str | None = None) -> Outcome:
    """Steps ``[first, last)`` of a job, from a checkpoint if there is one; runs on every rank."""
    engine = build_engine(job, from_scratch=load is None)
    vocab = model_config(job.cell).vocab_size
    if load is not None:
        path, state = engine.load_checkpoint(load)
        assert path is not None and state["step"] == first, (path, state)
    before = weights_of(engine)
    losses = [train_step(engine, step, vocab) for step in range(first, last)]
    if save is not None:
        engine.save_checkpoint(save, client_state={"step": last})
    outcome = Outcome(losses, before, weights_of(engine))
    engine.destroy()
    return outcome if dist.get_rank() == 0 else Outcome(outcome.losses, {}, {})


@dataclass(frozen=True)
class Row:
    """One resumed run beside the uninterrupted one; a run that failed has its reason instead."""

    saved: Job
    resumed: Job
    loss: float = float("nan")
    weights: float = float("nan")
    change: float = 0.0
    failure: str = ""

    @property
    def target(self) -> float:
        """0 where the layout is the same."""
        return 0.0 if self.saved.cell == self.resumed.cell else TARGET

    def problems(self) -> list[str]:
        """Why the row misses its target; empty if it meets it."""
        if self.failure:
            return [self.failure]
        found = [f"a weight moved by {self.change:.1%} only"] if self.change < VISIBLE_CHANGE else []
        # Not `difference > target`: NaN must miss.
        return found + [
            f"{what}: {difference:.1e} > {self.target:.0e}"
            for what, difference in (("loss", self.loss), ("weights", self.weights))
            if not difference <= self.target
        ]


def compare(saved: Job, resumed: Job, whole: Outcome, rest: Outcome) -> Row:
    """The largest relative differences."""
    theirs = whole.losses[SAVED_AFTER:]
    return Row(
        saved,
        resumed,
        loss=max(abs(a - b) / b for a, b in zip(rest.losses, theirs, strict=True)),
        weights=max(float((rest.weights[name] - w).norm() / w.norm()) for name, w in whole.weights.items()),
        change=min(
            float((w - rest.before[name]).norm() / w.norm())
            for name, w in rest.weights.items()
            if not (resumed.freeze and resumed.freeze in name)
        ),
    )


def resumed_rows(saved: Job, whole: Outcome, folder: str, jobs: Sequence[Job], ranks: Ranks) -> list[Row]:
    """Resume a checkpoint as each of the jobs, all of one number of ranks."""
    rows = []
    for job in jobs:
        try:
            rest = ranks.run(run, job, SAVED_AFTER, STEPS, folder)[0]
            rows.append(compare(saved, job, whole, rest))
        except RankError as error:
            first = next((each for each in error.errors if each), error)
            rows.append(Row(saved, job, failure=str(first).splitlines()[0][:200] or "failed"))
    return rows


LAYOUTS = ((2, 2), (1, 2), (4, 4), (1, 1))


def run_all(stages: Sequence[int] = (1, 2, 3)) -> list[Row]:
    """Save at SP 2 on 2 ranks, resume at every layout, for each stage."""
    saved = {stage: Job.of(stage, 2, 2) for stage in stages}
    wholes: dict[int, Outcome] = {}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="resume_") as root:
        for world_size in dict.fromkeys(world_size for _, world_size in LAYOUTS):
            with Ranks(world_size) as ranks:
                for stage, job in saved.items():
                    folder = str(Path(root) / str(stage))
                    if stage not in wholes:
                        wholes[stage] = ranks.run(run, job, 0, STEPS)[0]
                        ranks.run(run, job, 0, SAVED_AFTER, None, folder)
                    jobs = [Job.of(stage, sp_size, size) for sp_size, size in LAYOUTS if size == world_size]
                    rows += resumed_rows(job, wholes[stage], folder, jobs, ranks)
    return sorted(rows, key=lambda row: (row.saved.cell.stage, LAYOUTS.index(_layout(row.resumed))))


def _layout(job: Job) -> tuple[int, int]:
    return job.cell.sp_size, job.cell.world_size


def table_of(rows: Sequence[Row]) -> Table:
    """The rows as a table."""
    table = Table(title=f"Saved after step {SAVED_AFTER} at SP 2 on 2 ranks, resumed, against {STEPS} steps in one run")
    for column in ("ZeRO stage", "resumed at", "loss", "worst weight", "target", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        target = f"{row.target:.0e}" if row.target else "bit-equal"
        figures = (f"{row.loss:.1e}", f"{row.weights:.1e}")
        verdict = "; ".join(row.problems()) or "ok"
        table.add_row(str(row.saved.cell.stage), row.resumed.layout(), *figures, target, verdict)
    return table


def measure(console: Console) -> tuple[list[Row], list[str]]:
    """Run and print all; the rows, and a line for each that misses its target."""
    rows = run_all()
    console.print(table_of(rows))
    problems = [
        f"resume, stage {row.saved.cell.stage}, {row.resumed.layout()}: {problem}"
        for row in rows
        for problem in row.problems()
    ]
    return rows, problems


def main() -> int:
    """Print the table; 1 if a row misses its target."""
    start = time.monotonic()
    console = Console(width=120)
    rows, problems = measure(console)
    met = sum(not row.problems() for row in rows)
    console.print(f"{met} of {len(rows)} rows within their target (target: all)\n{time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare saved and resumed runs with uninterrupted ones: ``python -m benchmarks.resume``.

Four steps of a tiny Llama at SP 2 on 2 ranks, against two steps, a checkpoint, and two more steps in another run: with
the same SP degree, with another, and on other numbers of ranks, all with the same samples per step. A row shows the
largest relative difference of the loss and of a named parameter after the last step; the target is bit-equal for the
same layout, else 1e-6. Exit status 1 if a row misses it.
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
SAMPLES = 4  # per step, over all ranks
TARGET = 1e-6
# A smaller change would hide a wrong step.
VISIBLE_CHANGE = 1e-2


@dataclass(frozen=True)
class Job:
    """One program: a model, its layout, its optimizer."""

    cell: Cell
    optimizer: str = "adamw"
    freeze: str = ""
    """Substring of the names of frozen parameters."""

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
        """Create a job of ``SAMPLES`` samples per step, for any number of ranks.

        ``extra`` adds keys to the ds_config; the alst block enables the package at SP 1, too.
        """
        gas = SAMPLES // world_size
        cell = Cell(stage=stage, sp_size=sp_size, world_size=world_size, gas=gas, extra=extra, **cell)
        return cls(cell, optimizer, freeze)

    def layout(self) -> str:
        """Describe the SP degree and the number of ranks."""
        return f"SP {self.cell.sp_size} on {self.cell.world_size} rank{'s' * (self.cell.world_size > 1)}"


@dataclass
class Outcome:
    """Mean loss of each step, and the fp32 weights before the first and after the last."""

    losses: list[float]
    before: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def step_samples(step: int, vocab: int) -> list[dict[str, torch.Tensor]]:
    """Return the samples of a step in dataset order; lengths differ."""
    make = torch.Generator().manual_seed(step)
    ids = [torch.randint(0, vocab, (1, 40 + 8 * (each % 3)), generator=make) for each in range(SAMPLES)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def build_engine(job: Job, from_scratch: bool = True) -> Any:
    """Build the job's engine; a new run doubles its frozen weights, to test their restore."""
    import deepspeed

    model = build_model(model_config(job.cell))
    for name, param in model.named_parameters():
        if job.freeze and job.freeze in name:
            param.requires_grad_(False)
            param.data *= 2 if from_scratch else 1
    trained = [param for param in model.parameters() if param.requires_grad]
    # Two groups with different settings, as the HF Trainer creates them.
    groups = [
        {"params": [param for param in trained if param.dim() > 1], "lr": 1e-2, "weight_decay": 0.1},
        {"params": [param for param in trained if param.dim() == 1], "lr": 3e-2, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups) if job.optimizer == "adamw" else torch.optim.SGD(groups, momentum=0.0)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(job.cell, job.cell.sp_size))[0]


def micro_batches(engine: Any, step: int, vocab: int) -> Iterator[dict[str, torch.Tensor]]:
    """Return this rank's micro-batches of a step."""
    import deepspeed_alst

    own = step_samples(step, vocab)[dist.get_rank() :: dist.get_world_size()]
    return iter(deepspeed_alst.shard_dataloader(own, engine))


def train_step(engine: Any, step: int, vocab: int) -> float:
    """Run one optimizer step; return the mean loss of its samples."""
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
    """Return the full weights of all parameters."""
    return {name: full_weight(param) for name, param in engine.module.named_parameters()}


def run(job: Job, first: int, last: int, load: str | None = None, save: str | None = None) -> Outcome:
    """Run steps ``[first, last)`` of a job on every rank, from a checkpoint if given."""
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
    """Comparison of a resumed and the uninterrupted run, or the reason of a failure."""

    saved: Job
    resumed: Job
    loss: float = float("nan")
    weights: float = float("nan")
    change: float = 0.0
    failure: str = ""

    @property
    def target(self) -> float:
        """0 for the same layout."""
        return 0.0 if self.saved.cell == self.resumed.cell else TARGET

    def problems(self) -> list[str]:
        """Return reasons for a miss; empty if the target is met."""
        if self.failure:
            return [self.failure]
        found = [f"a weight moved by {self.change:.1%} only"] if self.change < VISIBLE_CHANGE else []
        # `not <=` instead of `>`, so that NaN misses.
        return found + [
            f"{what}: {difference:.1e} > {self.target:.0e}"
            for what, difference in (("loss", self.loss), ("weights", self.weights))
            if not difference <= self.target
        ]


def compare(saved: Job, resumed: Job, whole: Outcome, rest: Outcome) -> Row:
    """Compute the largest relative differences."""
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
    """Resume a checkpoint as each of the jobs, all with the same number of ranks."""
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
    """Save at SP 2 on 2 ranks, resume in every layout, for each stage."""
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
    """Format the rows as a table."""
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
    """Run and print all; return the rows, and a line for each miss."""
    rows = run_all()
    console.print(table_of(rows))
    problems = [
        f"resume, stage {row.saved.cell.stage}, {row.resumed.layout()}: {problem}"
        for row in rows
        for problem in row.problems()
    ]
    return rows, problems


def main() -> int:
    """Print the table; return 1 if a row misses its target."""
    start = time.monotonic()
    console = Console(width=120)
    rows, problems = measure(console)
    met = sum(not row.problems() for row in rows)
    console.print(f"{met} of {len(rows)} rows within their target (target: all)\n{time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

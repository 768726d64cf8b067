"""Compare saved and resumed runs with uninterrupted ones: ``python -m benchmarks.resume``.

Four steps of a tiny Llama or Qwen2.5-VL at SP 2 on 2 ranks, against two steps, a checkpoint, and two more steps in
another run: with the same SP degree, with another, and on other numbers of ranks, all with the same samples per step. A
row shows the largest relative difference of the loss and of a named parameter after the last step; the target is bit-
equal for the same layout, else 1e-6. Exit status 1 if a row misses it.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import cells
from benchmarks.cells import Cell, cell_model, ds_config, full_weight, model_config
from benchmarks.figures import Figure, Part, report
from benchmarks.multimodal_families import draw_batch, trained_model
from benchmarks.ranks import RankError, Ranks

STEPS, SAVED_AFTER = 4, 2
SAMPLES = 4  # per step, over all ranks
TARGET = 1e-6
# A smaller change would hide a wrong step.
VISIBLE_CHANGE = 1e-2
# ZeRO stage, and family of a model of images.
_KINDS = ((1, ""), (2, ""), (3, ""), (1, "qwen2_5_vl"), (3, "qwen2_5_vl"))
# SP degrees by number of ranks; the first ones save.
LAYOUTS = {2: (2, 1), 4: (4,), 1: (1,)}


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

    def trains(self, name: str) -> bool:
        """Return False for a frozen parameter."""
        is_used = not self.cell.media or trained_model(self.cell.media).get_parameter(name).requires_grad
        return is_used and not (self.freeze and self.freeze in name)

    def layout(self) -> str:
        """Describe the SP degree and the number of ranks."""
        return f"SP {self.cell.sp_size} on {self.cell.world_size} rank{'s' * (self.cell.world_size > 1)}"


@dataclass
class Outcome:
    """Mean loss of each step, and the fp32 weights before the first and after the last."""

    losses: list[float]
    before: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def step_samples(step: int, vocab: int, media: str = "") -> list[dict[str, torch.Tensor]]:
    """Return the samples of a step in dataset order; lengths differ, and numbers of images."""
    make = torch.Generator().manual_seed(step)
    if media:
        return [draw_batch(media, (1 + each % 2,), make) for each in range(SAMPLES)]
    ids = [torch.randint(0, vocab, (1, 40 + 8 * (each % 3)), generator=make) for each in range(SAMPLES)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def build_engine(job: Job, from_scratch: bool = True) -> Any:
    """Build the job's engine; a new run doubles its frozen weights, to test their restore."""
    import deepspeed

    model = cell_model(job.cell, model_config(job.cell))
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


def train_step(engine: Any, step: int, vocab: int, media: str = "") -> float:
    """Run one optimizer step; return the mean loss of its samples."""
    return cells.train_step(engine, step_samples(step, vocab, media)[dist.get_rank() :: dist.get_world_size()])


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
    losses = [train_step(engine, step, vocab, job.cell.media) for step in range(first, last)]
    if save is not None:
        engine.save_checkpoint(save, client_state={"step": last})
    outcome = Outcome(losses, before, weights_of(engine))
    engine.destroy()
    return outcome if dist.get_rank() == 0 else Outcome(outcome.losses, {}, {})


def resumed(saved: Job, whole: Outcome, folder: str, job: Job, ranks: Ranks) -> Figure:
    """Resume a checkpoint as a job; compare with the uninterrupted run, bit by bit in the same layout."""
    most = 0.0 if saved.cell == job.cell else TARGET
    name = " ".join(filter(None, (job.cell.media, f"ZeRO {job.cell.stage}, {job.layout()}")))
    target = f"<= {most:.0e}" if most else "bit-equal"
    try:
        rest = ranks.run(run, job, SAVED_AFTER, STEPS, folder)[0]
    except RankError as error:
        first = next((each for each in error.errors if each), error)
        return Figure(name, ("", ""), target, False, str(first).splitlines()[0][:200] or "failed")
    loss = max(abs(a - b) / b for a, b in zip(rest.losses, whole.losses[SAVED_AFTER:], strict=True))
    weights = max(float((rest.weights[each] - w).norm() / w.norm()) for each, w in whole.weights.items())
    trained = {each: w for each, w in rest.weights.items() if job.trains(each)}
    change = min(float((w - rest.before[each]).norm() / w.norm()) for each, w in trained.items())
    problem = "" if change >= VISIBLE_CHANGE else f"a weight moved by {change:.1%} only"
    met = loss <= most and weights <= most and not problem  # NaN misses
    return Figure(name, (f"{loss:.1e}", f"{weights:.1e}"), target, met, problem)


def rows(kinds: Sequence[tuple[int, str]] = _KINDS) -> Iterator[Figure]:
    """Save at SP 2 on 2 ranks, resume in every layout, for each stage and family of models of images."""
    wholes: dict[tuple[int, str], Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="resume_") as root:
        for world_size, sp_sizes in LAYOUTS.items():
            with Ranks(world_size) as ranks:
                for stage, media in kinds:
                    # Biases start at 0, and of some gradients only rounding is left, which Adam scales up.
                    freeze = ".bias" if media else ""
                    saved, folder = Job.of(stage, 2, 2, freeze=freeze, media=media), f"{root}/{media}{stage}"
                    if world_size == 2:
                        wholes[stage, media] = ranks.run(run, saved, 0, STEPS)[0]
                        ranks.run(run, saved, 0, SAVED_AFTER, None, folder)
                    for sp_size in sp_sizes:
                        job = Job.of(stage, sp_size, world_size, freeze=freeze, media=media)
                        yield resumed(saved, wholes[stage, media], folder, job, ranks)


PART = Part(rows, ("loss", "worst weight"), "Saved at SP 2 on 2 ranks, against an uninterrupted run.")

if __name__ == "__main__":
    sys.exit(report(__doc__, {"resumed": PART}))

"""Drop an optimizer step with a NaN or Inf loss or gradient before a weight changes, and raise.

Losses stay on the device until the step, where they are read at once; all ranks agree through one number over gloo.
Gradients are checked where DeepSpeed checks them (grad_reduction/step_dropper.py). Under fp16 nothing is done:
DeepSpeed's loss scaling skips the step and lowers the scale.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.distributed.collectives import raise_on_all_ranks
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import NonFiniteGradientError, NonFiniteLossError, SetupError
from deepspeed_alst.grad_reduction.step_dropper import StepDropper
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext

_ALIKE = 1e-5
"""Relative tolerance for one loss on two ranks, which compute it from the same sum."""


class NonFiniteLossCheck:
    """Losses of one engine since its last optimizer step, with the batches they belong to."""

    def __init__(self, groups: SequenceGroups, calls: ForwardContext) -> None:
        self._groups, self._calls = groups, calls
        self._losses: list[torch.Tensor] = []
        self._batches: list[tuple[int, int] | None] = []
        self._batch: tuple[int, int] | None = None
        self.dropper: StepDropper | None = None
        """None before the engine is built, and under fp16."""

    def note_batch(self, rank: int, number: int) -> None:
        """Record the next micro-step's batch: its rank and its number in that rank's loader, from 0 in each epoch."""
        self._batch = (rank, number)

    def add(self, loss: torch.Tensor) -> None:
        """Record the loss of a backward that begins."""
        self._losses.append(loss.detach())
        self._batches.append(self._batch)
        self._batch = None

    @contextlib.contextmanager
    def step(self, engine: Any) -> Iterator[None]:
        """Run the engine's step inside.

        Raises:
            NonFiniteLossError: on all ranks, whichever saw it, after the step was dropped; training can go on as if its
                batches had not been there.
            NonFiniteGradientError: the same, for gradients.
        """
        if not engine.is_gradient_accumulation_boundary():
            yield
            return
        losses, batches, self._losses, self._batches = self._losses, self._batches, [], []
        if losses and self._calls.makes_whole_loss:
            self._check_alike(losses)
        if self.dropper is None:
            yield
            return
        number = engine.global_steps + 1
        error, found = self._check(losses, batches, number)
        with self.dropper.dropping(found):
            yield
        if found:
            raise_on_all_ranks(error, self._groups.control_group)
        if getattr(engine.optimizer, "overflow", False) or self.dropper.parameter:
            raise _gradient_error(self.dropper.parameter, number)

    def _check_alike(self, losses: list[torch.Tensor]) -> None:
        """Raise SetupError if the ranks of a sequence have different losses, which are then losses of shards."""
        values = torch.stack([loss.double() for loss in losses]).cpu()
        bounds = torch.stack([values, -values])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self._groups.sp_control_group)
        high, low = bounds[0], -bounds[1]
        unlike = (high - low > _ALIKE * torch.maximum(high.abs(), low.abs())).nonzero().flatten().tolist()
        error = None
        if unlike:
            place = unlike[0]
            error = SetupError(
                f"engine.backward was given {float(values[place]):.6g} on this rank, and losses from "
                f"{float(low[place]):.6g} to {float(high[place]):.6g} on the ranks of one sequence: the program has "
                "made its loss of a shard's labels or values, and the model returns that of the whole sequence on "
                "every rank. Use that as it is, or scale it by what all ranks know (num_items_in_batch)."
            )
        raise_on_all_ranks(error, self._groups.control_group)

    def _check(
        self, losses: list[torch.Tensor], batches: list[tuple[int, int] | None], step: int
    ) -> tuple[NonFiniteLossError | None, bool]:
        """Return the error of this rank's losses, and True if any rank has one."""
        values = torch.stack([loss.double() for loss in losses]).tolist() if losses else []
        wrong = next((place for place, value in enumerate(values) if not math.isfinite(value)), None)
        found = torch.tensor([wrong is not None], dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._groups.control_group)
        error = None
        if wrong is not None:
            error = NonFiniteLossError(
                f"the loss is {values[wrong]} in optimizer step {step}, micro-step {wrong + 1} of "
                f"{len(values)}: {self._whose(batches[wrong], wrong)}. No weight has changed: the step was dropped. "
                "Look at the tokens and labels of that batch; if they are all right, the weights went astray before: "
                "lower the learning rate, or set gradient_clipping."
            )
        return error, bool(found.item())

    def _whose(self, batch: tuple[int, int] | None, place: int) -> str:
        if batch is None:  # HF Trainer: one batch of each rank in turn
            return f"a batch of rank {self._groups.ranks[place % self._groups.sp_size]}"
        return "rank {}'s batch {} of this epoch (counted from 0)".format(*batch)


def _gradient_error(parameter: str | None, step: int) -> NonFiniteGradientError:
    what = "the gradients' norm, though no gradient," if parameter is None else f"the gradient of {parameter}"
    return NonFiniteGradientError(
        f"{what} is NaN or infinite in optimizer step {step}, and the losses are finite. No weight has changed: the "
        "step was dropped. Look at what the backward of that parameter does (a division by 0, a square root at 0, a "
        "hook, an overflow in half precision); to train on without these batches, catch this error and go on."
    )

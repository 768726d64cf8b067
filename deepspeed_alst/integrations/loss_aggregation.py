"""Check of the first backwards of a program that aggregates its loss itself: equal losses, complete gradients.

Ranks of a sequence must pass ``engine.backward`` the same loss, and its gradient must flow through the collective: the
gradients at the P shards' losses must sum to P times the incoming gradient. A plain ``dist.all_reduce`` gives the right
value but 1/P of the gradient. DeepSpeed's own factor on ZeRO 0 to 2 compensates for it, this package's does not.
"""

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import gather_objects
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import SetupError

_BACKWARDS = 4
# The aggregated loss is bitwise equal if ranks add in the same order; losses of shards differ by far more.
_SAME_LOSS = 1e-5
# Gradients that bypass the collective are off by a factor of P.
_SAME_FACTOR = 0.01

_WAY_OUT = (
    "Aggregate as DeepSpeed's tutorial does, with torch.distributed.nn.functional.all_gather and the number of "
    "labelled tokens of each shard; or leave mpu and the adapter out, and this package makes the loss of the sequence."
)


@dataclass
class _Shard:
    """Loss that the model computed on one shard, and the gradient that arrived at it."""

    loss: float
    num_labels: int
    grad: float = 0.0

    def add(self, grad: torch.Tensor) -> None:
        """Accumulate the gradient; a hook on the loss."""
        self.grad += float(grad)


@dataclass(frozen=True)
class _Backward:
    """Loss, incoming gradient and shard of one backward on one rank."""

    loss: float
    seed: float
    shard: _Shard | None


class AggregationCheck:
    """Check of the model's losses and of ``engine.backward``, active in the first ``_BACKWARDS`` backwards."""

    def __init__(self, groups: SequenceGroups) -> None:
        self._groups = groups
        self._left = _BACKWARDS
        self._shards: list[_Shard] = []

    def watch_loss_function(self, model: Any, patches: PatchSet) -> None:
        """Record the model's loss on each shard and the gradient that arrives at it."""
        before = model.loss_function

        @functools.wraps(before)
        def loss_function(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = before(*args, **kwargs)
            if self._left and loss.requires_grad:
                shard = _Shard(float(loss.detach()), int((kwargs["shift_labels"] != IGNORED_LABEL).sum()))
                loss.register_hook(shard.add)
                self._shards.append(shard)
            return loss

        patches.set(model, "_loss_function", loss_function)

    @contextlib.contextmanager
    def backward(self, loss: torch.Tensor) -> Iterator[None]:
        """Run the engine's backward inside; raise SetupError on all ranks if the loss is not the sequence's."""
        if not self._left or not loss.requires_grad:  # the latter is DeepSpeed's to refuse
            yield
            return
        value = float(loss.detach())
        seeds: list[float] = []
        handle = loss.register_hook(lambda grad: seeds.append(float(grad)))
        self._raise_first(_different_losses, value)
        yield
        handle.remove()
        # Several forwards in one backward: whose gradient is whose cannot be told.
        shard = self._shards[0] if len(self._shards) == 1 else None
        self._raise_first(_lost_gradient, _Backward(value, seeds[-1] if seeds else 0.0, shard))
        self._shards.clear()
        self._left -= 1

    def _raise_first(self, problem_of: Any, mine: Any) -> None:
        """Check every sequence on every rank, so that all ranks raise SetupError or none does."""
        P = self._groups.sp_size
        everyone = gather_objects(mine, self._groups.control_group)
        for first in range(0, len(everyone), P):
            problem = problem_of(everyone[first : first + P])
            if problem:
                ranks = f"ranks {first} to {first + P - 1}, which share a sequence"
                raise SetupError(f"engine.backward on {ranks}: {problem}. {_WAY_OUT}")


def _different_losses(losses: list[float]) -> str | None:
    if all(_same(each, losses[0]) for each in losses):
        return None
    return f"the losses differ, {losses}, so they are those of shards"


def _same(one: float, other: float) -> bool:
    if not (math.isfinite(one) and math.isfinite(other)):
        return math.isfinite(one) == math.isfinite(other)
    return abs(one - other) <= _SAME_LOSS * max(abs(one), abs(other))


def _lost_gradient(ranks: list[_Backward]) -> str | None:
    """Compare the scales of the loss and of its gradient, relative to the mean over the sequence's tokens."""
    P = len(ranks)
    shards = [rank.shard for rank in ranks if rank.shard is not None]
    num_labels = sum(shard.num_labels for shard in shards)
    if len(shards) < P or not num_labels or not ranks[0].seed:
        return None
    mean = sum(shard.loss * shard.num_labels for shard in shards) / num_labels
    arrived = sum(shard.grad for shard in shards)
    of_value, of_gradient = (ranks[0].loss / mean if mean else 0.0), arrived / (P * ranks[0].seed)
    if abs(P * of_gradient - of_value) > _SAME_FACTOR * abs(of_value):
        return None
    return (
        f"the loss is the sequence's, but its gradient is {P} times too small: the collective that added it up is not "
        "differentiable"
    )

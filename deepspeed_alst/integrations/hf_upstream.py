"""Programs written for DeepSpeed's own ALST: their mpu, loaders, loss and tiles, redirected to this package.

Such a program registers DeepSpeed's attention before ``deepspeed.initialize``, passes DeepSpeed's mpu, wraps its loader
in ``UlyssesSPDataLoaderAdapter`` and aggregates the loss itself. Legend: B batch, S sequence of the input.
"""

import contextlib
import functools
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import accelerate
import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP, UlyssesSPDataLoaderAdapter
from deepspeed.utils import groups as deepspeed_groups
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepspeed_alst.core.patching import ABSENT, PatchSet, add_properties
from deepspeed_alst.distributed.collectives import gather_objects
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import SetupError, ShapeError
from deepspeed_alst.sequence_parallel.session import Session

_SKIP = "skip_first_batches"


def remove_upstream_attention(patches: PatchSet) -> None:
    """Remove DeepSpeed's attention wrapper from transformers, before the model is patched.

    The wrapper is in the interface's local mapping, which hides the models' own cores.

    Raises:
        SetupError: DeepSpeed's classes are redirected to another engine already.
    """
    if "__getattr__" in vars(UlyssesSPDataLoaderAdapter):
        raise SetupError(
            "deepspeed.initialize: DeepSpeed's ALST classes are already redirected to another engine of this process. "
            "Call its engine.destroy() first."
        )
    in_front = ALL_ATTENTION_FUNCTIONS._local_mapping
    for name, function in list(in_front.items()):
        if getattr(function, "__module__", "") == UlyssesSPDataLoaderAdapter.__module__:
            patches.entry(in_front, name, ABSENT)


class UpstreamProgram:
    """Redirect a program's use of DeepSpeed's ALST to an engine's session."""

    def __init__(self, engine: Any, session: Session, mpu: Any, patches: PatchSet) -> None:
        self._engine = engine
        # Outside of the engine's calls the program reads the real degree from DeepSpeed's groups.
        patches.set(deepspeed_groups, "mpu", mpu)
        _shard_adapters(session, patches)
        for upstream, ours in ((TiledMLP, tiled_mlp), (TiledFusedLogitsLoss, tiled_logits_loss)):
            patches.set(upstream, "apply", staticmethod(ours))
        self.aggregation = AggregationCheck(engine.module, session.groups, patches)

    def add_loss(self, output: Any, kwargs: dict[str, Any]) -> None:
        """Add ``outputs.loss``, computed from ``shift_labels`` when it is read, if the batch has no labels.

        accelerate's documented loop reads it; DeepSpeed's computes its own, and a second loss would hold a second copy
        of the logits.
        """
        labels = kwargs.get("shift_labels")
        if labels is not None and getattr(output, "loss", ...) is None and getattr(output, "logits", None) is not None:
            model = self._engine.module
            output._make_loss = functools.partial(
                model.loss_function, labels=None, shift_labels=labels, vocab_size=model.config.vocab_size
            )
            add_properties(output, loss=_LOSS_ON_DEMAND)


def _loss_on_demand(output: Any) -> torch.Tensor:
    if not hasattr(output, "_made_loss"):
        output._made_loss = output._make_loss(output.logits)
    return output._made_loss


_LOSS_ON_DEMAND = property(_loss_on_demand)


# --- loader


def _shard_adapters(session: Session, patches: PatchSet) -> None:
    """Make every ``UlyssesSPDataLoaderAdapter``, old or new, yield the session's shards.

    As in a DataLoader, ``iter`` starts an epoch; ``next`` without it continues the current one.
    """
    epochs: weakref.WeakKeyDictionary[Any, Iterator[Any]] = weakref.WeakKeyDictionary()
    skipped: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def micro_batches(inner: Any) -> Iterator[Any]:
        for batch in session.shard_dataloader(inner):
            batch.pop("labels", None)  # some recipes would compute a loss from them
            yield batch

    def start(adapter: Any) -> Any:
        epochs[adapter] = itertools.islice(micro_batches(adapter.dl), skipped.get(adapter, 0), None)
        return adapter

    def advance(adapter: Any) -> Any:
        if adapter not in epochs:
            start(adapter)
        try:
            return next(epochs[adapter])
        except StopIteration:
            del epochs[adapter]
            raise

    def inner_attribute(adapter: Any, name: str) -> Any:
        if name == "dl":  # not set yet while unpickling
            raise AttributeError(name)
        return getattr(adapter.dl, name)

    for name, method in (("__iter__", start), ("__next__", advance), ("__getattr__", inner_attribute)):
        patches.set(UlyssesSPDataLoaderAdapter, name, method)
    _skip_within_shards(skipped, patches)


def _skip_within_shards(skipped: weakref.WeakKeyDictionary[Any, int], patches: PatchSet) -> None:
    """Make accelerate's ``skip_first_batches`` keep an adapter; its own returns a plain loader of unsharded batches.

    ``skipped`` receives the micro-batches that a new adapter leaves out.
    """
    original = accelerate.data_loader.skip_first_batches

    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        if not isinstance(dataloader, UlyssesSPDataLoaderAdapter):
            return original(dataloader, num_batches)
        # num_batches counts micro-batches; one batch of the inner loader per rank gives sp_world_size of them.
        refills, rest = divmod(num_batches, dataloader.sp_world_size)
        of_rank = (dataloader.sp_rank, dataloader.sp_group, dataloader.sp_world_size, dataloader.device)
        again = type(dataloader)(original(dataloader.dl, refills), *of_rank)
        skipped[again] = rest
        return again

    for module in list(sys.modules.values()):  # those that have imported it by name
        if getattr(module, "__dict__", {}).get(_SKIP) is original:
            patches.set(module, _SKIP, skip_first_batches)


# --- loss

_BACKWARDS = 4
# The aggregated loss is bitwise equal if ranks add in the same order; losses of shards differ by far more.
_SAME_LOSS = 1e-5
# Gradients that bypass the collective are off by a factor of P.
_SAME_FACTOR = 0.01
_WAY_OUT = (
    "Aggregate as in DeepSpeed's tutorial, with torch.distributed.nn.functional.all_gather and the number of labelled "
    "tokens of each shard, or leave mpu and the adapter out, so that this package computes the whole sequence's loss."
)


class AggregationCheck:
    """Check of the first backwards: ranks of a sequence have one loss, and its gradient flows through the collective.

    Each of P ranks runs the backward of: sum over shards of (mean over the shard's n_r labelled tokens) * n_r / N. So
    the gradients at the shards' losses sum to P times the incoming one. A plain ``dist.all_reduce`` gives the right
    value but 1/P of the gradient, for which DeepSpeed's own factor on ZeRO 0 to 2 compensates.
    """

    def __init__(self, model: Any, groups: SequenceGroups, patches: PatchSet) -> None:
        self._groups, self._left = groups, _BACKWARDS
        self._shards: list[list[float]] = []
        before = model.loss_function

        @functools.wraps(before)
        def loss_function(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = before(*args, **kwargs)
            if self._left and loss.requires_grad:
                shard = [float(loss.detach()), float((kwargs["shift_labels"] != IGNORED_LABEL).sum())]
                loss.register_hook(lambda grad: shard.append(float(grad)))
                self._shards.append(shard)
            return loss

        patches.set(model, "_loss_function", loss_function)

    @contextlib.contextmanager
    def backward(self, loss: torch.Tensor) -> Iterator[None]:
        """Run the engine's backward inside; raise SetupError on all ranks if the loss is not the sequence's."""
        if not self._left or not loss.requires_grad:  # on the latter DeepSpeed raises
            yield
            return
        seeds = [0.0]
        handle = loss.register_hook(lambda grad: seeds.append(float(grad)))
        yield
        handle.remove()
        # The gradients of several forwards in one backward cannot be told apart.
        shard = self._shards[0] if len(self._shards) == 1 else None
        self._shards.clear()
        self._left -= 1
        # Every rank checks every sequence, so that all raise or none does.
        everyone = gather_objects((float(loss.detach()), seeds[-1], shard), self._groups.control_group)
        P = self._groups.sp_size
        for first in range(0, len(everyone), P):
            ranks = everyone[first : first + P]
            if problem := _different_losses([loss for loss, *_ in ranks]) or _lost_gradient(ranks):
                who = f"ranks {first} to {first + P - 1}, which share a sequence"
                raise SetupError(f"engine.backward on {who}: {problem}. {_WAY_OUT}")


def _different_losses(losses: list[float]) -> str | None:
    finite = [each for each in losses if math.isfinite(each)]
    if len(finite) in (0, len(losses)) and all(math.isclose(each, finite[0], rel_tol=_SAME_LOSS) for each in finite):
        return None
    return f"the losses differ, {losses}: each is a shard's"


def _lost_gradient(ranks: list[tuple[float, float, list[float] | None]]) -> str | None:
    """Compare the scales of the loss and of its gradient, relative to the mean over the sequence's tokens."""
    P, (loss, seed, _) = len(ranks), ranks[0]
    shards = [shard for *_, shard in ranks if shard is not None]
    num_labels = sum(shard[1] for shard in shards)
    if len(shards) < P or not num_labels or not seed:
        return None
    mean = sum(shard[0] * shard[1] for shard in shards) / num_labels
    of_value, of_gradient = (loss / mean if mean else 0.0), sum(sum(shard[2:]) for shard in shards) / (P * seed)
    if abs(P * of_gradient - of_value) > _SAME_FACTOR * abs(of_value):
        return None
    return (
        f"the loss is the sequence's, but its gradient is {P} times too small: the collective that sums it is not "
        "differentiable"
    )


# --- tiles: DeepSpeed's signatures, as plain checkpointed tiles, of which autograd sums a weight's gradients


def tiled_mlp(
    fn: Callable[[Any, torch.Tensor], torch.Tensor],
    module: Any,
    x: torch.Tensor,
    shards: int,
    compute_params: Sequence[torch.nn.Parameter] | None = None,
) -> torch.Tensor:
    """Compute ``fn(module, x)`` in at most ``shards`` tiles of tokens: ``[..., S, M] -> [..., S, M']``.

    ``compute_params`` is accepted but unused: autograd tracks the weights.
    """
    outputs = [checkpoint(fn, module, tile, use_reentrant=False) for tile in torch.chunk(x, shards, dim=-2)]
    return torch.cat(outputs, dim=-2)


def tiled_logits_loss(
    fn: Callable[..., torch.Tensor],
    module: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    shards: int,
    compute_params: Sequence[torch.nn.Parameter] | None,
    output_reduction: str,
) -> torch.Tensor:
    """Compute the sum or mean of ``fn(module, x, y)`` over tiles of tokens: ``[B, S, ...], [B, S, ...] -> []``.

    ``fn`` gets rows of all samples, ``[T', ...]``, and a tile of ``mask`` as a third tensor if there is one. "mean"
    divides by the actual number of tiles, at most ``shards``.

    Raises:
        ShapeError: an unknown reduction, or mismatched shapes.
    """
    shapes = [list(each.shape[:2]) for each in (x, y, mask) if each is not None]
    if output_reduction not in ("mean", "sum") or len(shapes[0]) < 2 or any(each != shapes[0] for each in shapes):
        raise ShapeError(
            "TiledFusedLogitsLoss: x, y and mask must start with the same [batch, sequence], and output_reduction be "
            f"'mean' or 'sum' (got {shapes} and {output_reduction!r})"
        )
    rows = [x, y] if mask is None else [x, y, mask]
    tiles = zip(*(torch.chunk(each.flatten(0, 1), shards) for each in rows), strict=True)
    losses = torch.stack([checkpoint(fn, module, *tile, use_reentrant=False) for tile in tiles])
    return losses.mean() if output_reduction == "mean" else losses.sum()

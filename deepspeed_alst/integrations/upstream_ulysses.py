"""Programs written for DeepSpeed's own ALST: their mpu, loaders, loss and tiles, redirected to this package.

Such a program registers DeepSpeed's attention before ``deepspeed.initialize``, passes DeepSpeed's mpu, wraps its loader
in ``UlyssesSPDataLoaderAdapter`` and aggregates the loss itself, through a differentiable all_gather:

    sum over the P ranks of  (mean over the n_r labelled tokens of shard r) * n_r / N

Each rank runs that sum's backward, so a shard's mean gets P * n_r / N, and DeepSpeed, called with SP 1, divides by all
W ranks: each sequence counts 1 / (W / P), the mean over the replicas.
"""

import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP, UlyssesSPDataLoaderAdapter
from deepspeed.utils import groups as deepspeed_groups

from deepspeed_alst.core.patching import PatchSet, add_properties
from deepspeed_alst.errors import SetupError
from deepspeed_alst.integrations.hf_upstream import skip_within_shards, take_out_upstream_attention
from deepspeed_alst.integrations.loss_aggregation import AggregationCheck
from deepspeed_alst.integrations.upstream_tiling import tiled_logits_loss, tiled_mlp
from deepspeed_alst.sequence_parallel.session import Session


def prepare_adoption(patches: PatchSet) -> None:
    """Remove DeepSpeed's attention wrapper from transformers, before the model is patched.

    Raises:
        SetupError: DeepSpeed's classes are redirected to another engine already.
    """
    if "__getattr__" in vars(UlyssesSPDataLoaderAdapter):
        raise SetupError(
            "DeepSpeed's ALST classes serve another engine of this process already: call its engine.destroy() first"
        )
    take_out_upstream_attention(patches)


class UpstreamProgram:
    """Lead what a program uses of DeepSpeed's ALST to an engine's session."""

    def __init__(self, engine: Any, session: Session, mpu: Any, patches: PatchSet) -> None:
        self._engine = engine
        # Outside of the engine's calls the program asks DeepSpeed for its groups, and means the real degree.
        patches.set(deepspeed_groups, "mpu", mpu)
        _shard_adapters(session, patches)
        for upstream, ours in ((TiledMLP, tiled_mlp), (TiledFusedLogitsLoss, tiled_logits_loss)):
            patches.set(upstream, "apply", staticmethod(ours))
        self.aggregation = AggregationCheck(session.groups)
        self.aggregation.watch_loss_function(engine.module, patches)

    def add_loss(self, output: Any, kwargs: dict[str, Any]) -> None:
        """Add ``outputs.loss`` without labels in the batch: made of ``shift_labels`` when it is read, and not before.

        accelerate's documented loop reads it; DeepSpeed's makes its own, beside which a second one would hold a second
        copy of the logits.
        """
        labels = kwargs.get("shift_labels")
        if labels is not None and getattr(output, "loss", ...) is None and getattr(output, "logits", None) is not None:
            model = self._engine.module
            output._make_loss = functools.partial(
                model.loss_function, labels=None, shift_labels=labels, vocab_size=model.config.vocab_size
            )
            add_properties(output, loss=_LOSS_ON_DEMAND)


# --- loader


def _shard_adapters(session: Session, patches: PatchSet) -> None:
    """Make every ``UlyssesSPDataLoaderAdapter``, old or new, yield the session's shards.

    As in a DataLoader, ``iter`` starts an epoch; ``next`` without it continues the current one.
    """
    epochs: weakref.WeakKeyDictionary[Any, Iterator[Any]] = weakref.WeakKeyDictionary()
    skipped: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def start(adapter: Any) -> Any:
        epochs[adapter] = itertools.islice(_micro_batches(session, adapter.dl), skipped.get(adapter, 0), None)
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

    def rewrap(adapter: Any, inner: Any, num_skipped: int) -> Any:
        again = type(adapter)(inner, adapter.sp_rank, adapter.sp_group, adapter.sp_world_size, adapter.device)
        skipped[again] = num_skipped
        return again

    for name, method in (("__iter__", start), ("__next__", advance), ("__getattr__", inner_attribute)):
        patches.set(UlyssesSPDataLoaderAdapter, name, method)
    skip_within_shards(UlyssesSPDataLoaderAdapter, rewrap, patches)


def _micro_batches(session: Session, inner: Any) -> Iterator[Any]:
    """Yield the session's shards without ``labels``, as recipes expect: some compute a loss from them."""
    for batch in session.shard_dataloader(inner):
        batch.pop("labels", None)
        yield batch


# --- loss


def _loss_on_demand(output: Any) -> torch.Tensor:
    if not hasattr(output, "_made_loss"):
        output._made_loss = output._make_loss(output.logits)
    return output._made_loss


_LOSS_ON_DEMAND = property(_loss_on_demand)

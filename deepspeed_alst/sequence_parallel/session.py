"""Sequence parallelism on one engine: its state, its wrappers, and their undo."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.hf_attention import find_backend
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.forward_context import Draws, ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.exchange import BatchExchange
from deepspeed_alst.data.loader import ShardedDataLoader
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.data.validation import checked, vocabulary_of
from deepspeed_alst.distributed.collectives import agree, gather_objects, name_missing_ranks
from deepspeed_alst.distributed.mesh import build_groups, ranks_of_node
from deepspeed_alst.errors import DataError, SetupError
from deepspeed_alst.grad_reduction.checks import NonFiniteCheck


class Session:
    """Sequence parallelism on one engine; ``engine.alst``."""

    def __init__(
        self,
        spec: ModelSpec,
        config: AlstConfig,
        control_group: Any,
        patches: PatchSet,
        heads: Sequence[tuple[int, int, str]] = (),
    ) -> None:
        self.config = config
        self.groups = build_groups(config.sequence_parallel_size, control_group)
        patches.callback(self.groups.destroy)
        self.mpu = self.groups.as_mpu()
        self.reduction_bytes = 0.0
        """Bytes that this rank sends per step for the gradient reduction."""
        self.takes_whole = False
        """True if the engine accepts whole batches, which it splits itself."""
        self.splits_decoder = spec.whole is not spec.outer or not spec.is_causal_lm
        """True if calls of a part of the model are split, and the rest of it gets whole batches."""
        self.is_multimodal = spec.is_multimodal
        """True if the split part is the language model of a model of images or audio and text."""
        backend = find_backend(spec.config._attn_implementation)
        size, node_size = config.sequence_parallel_size, ranks_of_node(control_group)
        self.heads = [HeadPlan(size, *each, node_size=node_size) for *each, of in heads if of == "attention"]
        """Split of the heads of attention, unless layers have different numbers."""
        self.is_causal_lm = spec.is_causal_lm
        """True if the split part is a causal language model."""
        self.sharding = ShardingConfig(
            config.padding_multiple(),
            packing=backend is not None,
            marks_padding=bool(spec.router_classes),
            by_lowest=backend is not None and not backend.uses_mask,
            vocabulary=vocabulary_of(spec),
        )
        """Form of the batches; read when a loader is made."""
        # Rank 0's seed: programs may seed each rank differently.
        seed = gather_objects(torch.initial_seed(), control_group)[0]
        self.calls = ForwardContext(draws=Draws(seed, replica=self.groups.dp_rank), node_size=node_size)
        self.losses = NonFiniteCheck(self.groups, self.calls)
        self._patches, self.outer = patches, spec.outer
        self._in_backward = False
        self._loss_divisor = 1

    def attach(self, engine: Any) -> None:
        """Use an engine's clock for random numbers, and give it the size of its batches."""
        self._patches.set(engine, "alst", self)
        # A program's reference or teacher. ZeRO 3 has an "optimizer" without one.
        self.takes_whole |= engine.client_optimizer is None and not engine.optimizer_name()
        # DeepSpeed restarts micro_steps at 0 after a resume.
        self.calls.draws.clock = lambda: (
            engine.global_steps,
            engine.micro_steps % engine.gradient_accumulation_steps(),
        )
        # DeepSpeed sets None for such an mpu, and set_train_batch_size multiplies by it.
        engine.dp_world_size = self.groups.dp_size

    def shard_dataloader(self, loader: Any, whole: bool = False) -> ShardedDataLoader:
        """Wrap a loader to yield this rank's shards; a sharded loader is returned unchanged.

        With ``whole``, and for a model whose decoder is split, ranks get each batch whole.
        """
        if isinstance(loader, ShardedDataLoader) or hasattr(loader, "alst_whole"):
            return loader
        whole = whole or self.splits_decoder
        return ShardedDataLoader(loader, self.groups, self.sharding, self.losses.note_batch, whole)

    def exchange(self, batch: Any, place: str = "", whole: bool = False) -> list[Any]:
        """Return this rank's shards of its sequence-parallel group's batches, in rank order; or whole batches."""
        return BatchExchange(self.groups, self.sharding, whole).exchange(batch, place)

    def meet(self, place: str) -> None:
        """Synchronize all ranks at a place in their data without a batch."""
        BatchExchange(self.groups, self.sharding).meet(place)

    def cut(self, batch: Any) -> dict[str, Any]:
        """Return this rank's shard of a batch that all ranks of its sequence have, where the batch is.

        An error is raised on all ranks. Gradients of its tensors are those of the shard's tokens.
        """
        groups = self.groups
        with name_missing_ranks(groups.roll_group), agree(groups.control_group, DataError, "a batch cannot be split"):
            whole = checked(batch, self.sharding.vocabulary, takes_gradients=True)
            sharded = shard_batch(whole, groups.sp_size, self.sharding)
        shard = sharded.shards[groups.sp_rank]
        return {**{key: x.contiguous() for key, x in shard.items()}, **sharded.common}

    def shard_length(self, length: int) -> int:
        """Return the tokens of a shard of a sequence, padding included."""
        return self.sharding.padded(length) // self.groups.sp_size

    @contextlib.contextmanager
    def averaged_over_micro_steps(self) -> Iterator[None]:
        """Count P micro-steps as one in the context, for callers that scale the loss without DeepSpeed's 1/GAS."""
        self._loss_divisor = self.groups.sp_size
        try:
            yield
        finally:
            self._loss_divisor = 1

    def sharded_io(self, io: Any, dataset: Any, *args: Any, **kwargs: Any) -> ShardedDataLoader:
        """``engine.deepspeed_io`` with samples drawn per rank, not per replica: the sharded loader wants all."""
        world_size = self.groups.dp_size * self.groups.sp_size
        rank = self.groups.dp_rank * self.groups.sp_size + self.groups.sp_rank
        if isinstance(dataset, torch.utils.data.IterableDataset):
            raise DataError(
                f"training_data is a {type(dataset).__name__}, an IterableDataset, which DeepSpeed's loader cannot "
                "read (it asks for a length and a sampler). Leave it out and make a loader of each rank's own samples: "
                "loader = deepspeed_alst.shard_dataloader(torch.utils.data.DataLoader(dataset, batch_size=...), engine)"
            )
        if len(args) < 4 and kwargs.get("data_sampler") is None:
            # Shuffled for training like DeepSpeed's own loader; its other routes read in order.
            shuffle = (args[1] if len(args) > 1 else kwargs.get("route", "train")) == "train"
            kwargs["data_sampler"] = DistributedSampler(dataset, world_size, rank, shuffle=shuffle)
        return self.shard_dataloader(io(dataset, *args, **kwargs))

    def watch_loss(self, output: Any) -> None:
        """Raise in a direct backward of a forward's loss or logits."""
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        if loss is None:  # the program makes its own, of the logits
            loss = getattr(output, "logits", None)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.register_hook(self._check_backward)

    def note_own_loss(self, x: torch.Tensor) -> None:
        """Count a tensor of the whole sequence, of which a program makes its loss."""
        self.calls.note_loss(x)
        if x.requires_grad:
            x.register_hook(self._check_backward)

    def _check_backward(self, grad: torch.Tensor) -> None:
        if not self._in_backward:
            raise SetupError(
                "call engine.backward(loss), not loss.backward(): with gradient accumulation, which sequence "
                "parallelism needs, DeepSpeed 0.19.8 scales a direct backward by another factor on ZeRO 1 and 2"
            )

    @contextlib.contextmanager
    def backward(self, loss: torch.Tensor) -> Iterator[torch.Tensor]:
        """Run the engine's backward inside, on the loss that is yielded.

        Raises:
            SetupError: the loss was not computed from the model's own.
        """
        self._in_backward, self.calls.gradients = True, 0
        self.losses.add(loss)
        try:
            yield loss if self._loss_divisor == 1 else loss / self._loss_divisor
        finally:
            self._in_backward = False
        if self.calls.makes_whole_loss and not self.calls.gradients:
            raise SetupError(
                "engine.backward was given a loss that does not depend on outputs.loss: one computed from its "
                "logits covers only this rank's shard. Give the batch labels and use the loss that the model returns."
            )

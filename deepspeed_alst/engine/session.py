"""What the package has done to one engine, and how it is undone."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from deepspeed_alst.config import AlstConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.checks import Vocabulary
from deepspeed_alst.data.loader import ShardedDataLoader
from deepspeed_alst.engine.checkpoint import install_checkpoints
from deepspeed_alst.engine.dropping import StepDropper
from deepspeed_alst.engine.finite import LossWatch
from deepspeed_alst.engine.probe import Probe
from deepspeed_alst.engine.whole_batches import split_whole_batches
from deepspeed_alst.errors import DataError, SetupError, UnsupportedModelError
from deepspeed_alst.models.calls import Calls
from deepspeed_alst.models.dropout import Draws
from deepspeed_alst.parallel.agreement import gather_objects
from deepspeed_alst.parallel.groups import SequenceGroups
from deepspeed_alst.parallel.mpu import UlyssesMpu, installed
from deepspeed_alst.parallel.roll_call import naming_who_is_missing

# Calls that read deepspeed.utils.groups.mpu, directly or in what they call.
_CALLS_THAT_READ_THE_MPU = (
    "forward",
    "backward",
    "step",
    "save_checkpoint",
    "load_checkpoint",
    "save_16bit_model",
    "destroy",
)
_CALLS_WITH_COLLECTIVES = ("forward", "backward", "step", "save_checkpoint", "load_checkpoint")


class Session:
    """Sequence parallelism on one engine; ``engine.alst``."""

    def __init__(
        self,
        config: AlstConfig,
        groups: SequenceGroups,
        mpu: UlyssesMpu,
        packing: bool,
        by_lowest: bool,
        marks_padding: bool,
        vocabulary: Vocabulary,
        patches: PatchSet,
    ) -> None:
        self.config = config
        self._packing, self._by_lowest, self._vocabulary = packing, by_lowest, vocabulary
        self.marks_padding = marks_padding
        """Whether batches say which of their tokens are padding; read when a loader is made."""
        self.reduction_bytes = 0.0
        """What this rank sends in a step for the gradients' reduction."""
        self.takes_whole = False
        """Whether the engine is given whole batches, which it splits itself."""
        self.probe: Probe | None = None
        """Of the averaging over ranks; there once the engine is built."""
        self.groups = groups
        self.mpu = mpu
        # Rank 0's seed: programs may give each rank another.
        seed = gather_objects(torch.initial_seed(), groups.control_group)[0]
        self.calls = Calls(draws=Draws(seed, replica=groups.dp_rank))
        self._losses = LossWatch(groups, self.calls)
        self._patches = patches
        self._in_backward = False
        self._loss_divisor = 1

    def attach(self, engine: Any) -> None:
        """Wire a fresh engine: its calls see its own mpu, its loaders are sharded, ``destroy`` undoes everything."""
        self._patches.set(engine, "alst", self)
        self.calls.draws.clock = functools.partial(_step_and_micro_step, engine)
        # DeepSpeed has None here for an mpu of this kind, and set_train_batch_size multiplies by it.
        engine.dp_world_size = self.groups.dp_size
        for name in _CALLS_THAT_READ_THE_MPU:
            self.wrap(engine, name, functools.partial(_under_mpu, self.mpu))
        self.wrap(engine, "forward", self._watch_loss)
        self.wrap(engine, "backward", self._mark_backward)
        self.wrap(engine, "step", functools.partial(self._losses.before_step, engine))
        self.wrap(engine, "compile", _refuse_compiled_autograd)
        install_checkpoints(engine, self.groups.control_group, self._patches)
        self.wrap(engine, "deepspeed_io", lambda io: functools.partial(self._sharded_io, io))
        self.wrap(engine, "destroy", self._and_close)
        for name in _CALLS_WITH_COLLECTIVES:
            self.wrap(engine, name, functools.partial(_naming_who_is_missing, self.groups.roll_group))

    def watch_gradients(self, engine: Any) -> None:
        """Have NaN and Inf drop a step; after the reduction is installed, whose norm it reads."""
        if not engine.fp16_enabled():
            self._losses.dropper = StepDropper(engine, self._patches)

    def shard_dataloader(self, loader: Any, whole: bool = False) -> ShardedDataLoader:
        """The loader's batches, split over the ranks of a sequence; a loader that is split already stays as it is.

        With ``whole`` its ranks get each batch whole, for an engine that takes whole batches.
        """
        if isinstance(loader, ShardedDataLoader) or hasattr(loader, "alst_whole"):
            return loader
        return ShardedDataLoader(
            loader,
            self.groups,
            self.config.padding_multiple(),
            self._packing,
            self.marks_padding,
            self._vocabulary,
            self._losses.note_batch,
            self._by_lowest,
            whole,
        )

    def exchange(self, batch: Any, place: str = "", whole: bool = False) -> list[Any]:
        """This rank's shards of the batches that the ranks of its sequence bring, in their order; or the batches."""
        return self.shard_dataloader((), whole).exchange(batch, place)

    def meet(self, place: str) -> None:
        """All ranks are at a place in their data where no batch follows."""
        self.shard_dataloader(()).meet(place)

    def cut(self, batch: Any) -> Any:
        """This rank's shard of a batch that all ranks of its sequence have."""
        return self.shard_dataloader(()).cut(batch)

    def split_whole_batches(self, engine: Any) -> None:
        """Have the engine take whole batches where they may come; what else wraps its forward sees their shards."""
        self.wrap(engine, "forward", functools.partial(split_whole_batches, self))

    @contextlib.contextmanager
    def whole_batches(self) -> Iterator[None]:
        """Inside, the engine takes whole batches too (engine/whole_batches.py)."""
        before, self.takes_whole = self.takes_whole, True
        try:
            yield
        finally:
            self.takes_whole = before

    @contextlib.contextmanager
    def averaged_over_micro_steps(self) -> Iterator[None]:
        """Inside, P micro-steps count as one: for callers who scale the loss themselves, without DeepSpeed's 1/GAS."""
        self._loss_divisor = self.groups.sp_size
        try:
            yield
        finally:
            self._loss_divisor = 1

    def close(self) -> None:
        """Take everything back: the model, the engine's methods, the process groups."""
        self._patches.close()

    def wrap(self, engine: Any, name: str, wrapper: Any) -> None:
        """Put a wrapper around one of the engine's methods, on the instance; closing the session takes it off."""
        self._patches.wrap(engine, name, wrapper)

    def _sharded_io(self, io: Any, dataset: Any, *args: Any, **kwargs: Any) -> ShardedDataLoader:
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
            # Shuffled for training as DeepSpeed's own loader does it; its other routes read in order.
            shuffle = (args[1] if len(args) > 1 else kwargs.get("route", "train")) == "train"
            kwargs["data_sampler"] = DistributedSampler(dataset, world_size, rank, shuffle=shuffle)
        return self.shard_dataloader(io(dataset, *args, **kwargs))

    def _watch_loss(self, forward: Any) -> Any:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
            if loss is None:  # the program makes its own, of the logits
                loss = getattr(output, "logits", None)
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.register_hook(self._check_backward)
            return output

        return watched

    def _mark_backward(self, backward: Any) -> Any:
        @functools.wraps(backward)
        def marked(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._in_backward, self.calls.gradients = True, 0
            self._losses.add(loss)
            try:
                scaled = loss if self._loss_divisor == 1 else loss / self._loss_divisor
                result = backward(scaled, *args, **kwargs)
            finally:
                self._in_backward = False
            if self.calls.makes_whole_loss and not self.calls.gradients:
                raise SetupError(
                    "engine.backward was given a loss that is not made of the model's own: one made of its logits is "
                    "the loss of a shard. Give the batch labels and use the loss that the model returns."
                )
            return result

        return marked

    def _check_backward(self, grad: torch.Tensor) -> None:
        if not self._in_backward:
            raise SetupError(
                "call engine.backward(loss), not loss.backward(): with gradient accumulation, which sequence "
                "parallelism needs, DeepSpeed 0.19.8 scales a direct backward by another factor on ZeRO 1 and 2"
            )

    def _and_close(self, destroy: Any) -> Any:
        @functools.wraps(destroy)
        def destroy_and_close(*args: Any, **kwargs: Any) -> Any:
            result = destroy(*args, **kwargs)
            self.close()
            return result

        return destroy_and_close


def _refuse_compiled_autograd(compile_engine: Any) -> Any:
    @functools.wraps(compile_engine)
    def compile_plainly(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("compiled_autograd_enabled") or (len(args) > 3 and args[3]):
            raise UnsupportedModelError(
                "engine.compile(compiled_autograd_enabled=True): a compiled backward is not verified under sequence "
                "parallelism; leave it out, and forward and backward of each part between the collectives are compiled"
            )
        return compile_engine(*args, **kwargs)

    return compile_plainly


def _step_and_micro_step(engine: Any) -> tuple[int, int]:
    # DeepSpeed counts micro-steps from 0 again after a resume.
    return engine.global_steps, engine.micro_steps % engine.gradient_accumulation_steps()


def _under_mpu(mpu: UlyssesMpu, method: Any) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with installed(mpu):
            return method(*args, **kwargs)

    return call


def _naming_who_is_missing(group: Any, method: Any) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with naming_who_is_missing(group):
            return method(*args, **kwargs)

    return call

"""What the package has done to one engine, and how it is undone."""

import functools
from contextlib import ExitStack
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from deepspeed_alst.config import AlstConfig
from deepspeed_alst.data.loader import ShardedDataLoader
from deepspeed_alst.errors import SetupError, UnsupportedModelError
from deepspeed_alst.parallel.groups import SequenceGroups
from deepspeed_alst.parallel.mpu import UlyssesMpu, installed

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


class Session:
    """Sequence parallelism on one engine; ``engine.alst``."""

    def __init__(self, config: AlstConfig, groups: SequenceGroups, mpu: UlyssesMpu, undo: ExitStack) -> None:
        self.config = config
        self.groups = groups
        self.mpu = mpu
        self._undo = undo
        self._in_backward = False

    def attach(self, engine: Any) -> None:
        """Wire a fresh engine: its calls see its own mpu, its loaders are sharded, ``destroy`` undoes everything."""
        engine.alst = self
        # DeepSpeed has None here for an mpu of this kind, and set_train_batch_size multiplies by it.
        engine.dp_world_size = self.groups.dp_size
        for name in _CALLS_THAT_READ_THE_MPU:
            self._wrap(engine, name, functools.partial(_under_mpu, self.mpu))
        self._wrap(engine, "forward", self._watch_loss)
        self._wrap(engine, "backward", self._mark_backward)
        self._wrap(engine, "compile", _refuse_compile)
        self._wrap(engine, "deepspeed_io", lambda io: functools.partial(self._sharded_io, io))
        self._wrap(engine, "destroy", self._and_close)
        self._undo.callback(engine.__dict__.pop, "alst", None)

    def shard_dataloader(self, loader: Any) -> ShardedDataLoader:
        """The loader's batches, split over the ranks of a sequence; a loader that is split already stays as it is."""
        if isinstance(loader, ShardedDataLoader):
            return loader
        return ShardedDataLoader(loader, self.groups, self.config.padding_multiple())

    def adopt(self, undo: ExitStack) -> None:
        """Own what is to be undone; until now the caller did, and would have undone it at an error."""
        self._undo = undo

    def close(self) -> None:
        """Take everything back: the model, the engine's methods, the process groups."""
        self._undo.close()

    def _wrap(self, engine: Any, name: str, wrapper: Any) -> None:
        before = engine.__dict__.get(name)
        engine.__dict__[name] = wrapper(getattr(engine, name))

        def restore() -> None:
            if before is None:
                engine.__dict__.pop(name, None)
            else:
                engine.__dict__[name] = before

        self._undo.callback(restore)

    def _sharded_io(self, io: Any, dataset: Any, *args: Any, **kwargs: Any) -> ShardedDataLoader:
        """``engine.deepspeed_io`` with samples drawn per rank, not per replica: the sharded loader wants all."""
        world_size = self.groups.dp_size * self.groups.sp_size
        rank = self.groups.dp_rank * self.groups.sp_size + self.groups.sp_rank
        iterable = isinstance(dataset, torch.utils.data.IterableDataset)
        if len(args) < 4 and kwargs.get("data_sampler") is None and not iterable:
            # Shuffled for training as DeepSpeed's own loader does it; its other routes read in order.
            shuffle = (args[1] if len(args) > 1 else kwargs.get("route", "train")) == "train"
            kwargs["data_sampler"] = DistributedSampler(dataset, world_size, rank, shuffle=shuffle)
        return self.shard_dataloader(io(dataset, *args, **kwargs))

    def _watch_loss(self, forward: Any) -> Any:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
            if isinstance(loss, torch.Tensor) and loss.requires_grad:
                loss.register_hook(self._check_backward)
            return output

        return watched

    def _mark_backward(self, backward: Any) -> Any:
        @functools.wraps(backward)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self._in_backward = True
            try:
                return backward(*args, **kwargs)
            finally:
                self._in_backward = False

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


def _refuse_compile(compile_engine: Any) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise UnsupportedModelError("engine.compile: torch.compile is not yet available under sequence parallelism")

    return refuse


def _under_mpu(mpu: UlyssesMpu, method: Any) -> Any:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with installed(mpu):
            return method(*args, **kwargs)

    return call

"""Loaders prepared by accelerate, whose batches the engine shards; it may be created after them.

In training every batch is one micro-step on each rank of a sequence; all of them get it whole, in turn, so that a
program may generate from it. In evaluation each rank has its own batches, as without sequence parallelism.
"""

from collections.abc import Iterator
from typing import Any

import torch


class PreparedLoader:
    """Wrapper of a prepared loader; attributes other than batches and length are the loader's."""

    alst_whole = True

    def __init__(self, loader: Any, accelerator: Any, sp_size: int) -> None:
        self.loader, self._accelerator, self._sp_size = loader, accelerator, sp_size
        self._turns = sp_size

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet: unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        """Return the batches of an epoch: this rank's own in evaluation, all of its sequence's ranks in training."""
        return len(self.loader) * self._turns

    def __iter__(self) -> Iterator[Any]:
        """Iterate over one epoch, of training or evaluation as the model's mode says."""
        wrapped = self._accelerator.deepspeed_engine_wrapped
        session = getattr(getattr(wrapped, "engine", None), "alst", None)
        if session is None or not wrapped.engine.module.training:
            self._turns = 1
            yield from self.loader
            return
        self._turns = self._sp_size
        device = getattr(self.loader, "device", None)
        for batch in session.shard_dataloader(self.loader, whole=True):
            if device is not None:
                for key, x in batch.items():
                    batch[key] = x.to(device) if isinstance(x, torch.Tensor) else x
            yield batch

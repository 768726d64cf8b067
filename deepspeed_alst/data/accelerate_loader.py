"""Loaders prepared by accelerate, whose batches the engine shards; it may be created after them.

In training every batch is one micro-step on each rank of a sequence; all of them get it whole, in turn, so that a
program may generate from it. In evaluation each rank has its own batches, as without sequence parallelism.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from deepspeed_alst.core.patching import wrap_once


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


def hook_loaders(accelerator_class: Any, splits: Callable[[Any, Any], bool]) -> None:
    """Patch an Accelerator class to return PreparedLoaders where ``splits(ds_config, parallelism_config)``."""

    def sp_size_of(accelerator: Any) -> int:
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        # The HF Trainer shards its batches elsewhere and has its own config class.
        if plugin is None or type(plugin.hf_ds_config).__name__ == "HfTrainerDeepSpeedConfig":
            return 1
        config = plugin.deepspeed_config
        return int(config["sequence_parallel_size"]) if splits(config, accelerator.parallelism_config) else 1

    def preparing(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_data_loader(self: Any, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
            loader, sp_size = prepare(self, data_loader, *args, **kwargs), sp_size_of(self)
            is_prepared = sp_size == 1 or isinstance(loader, PreparedLoader)
            return loader if is_prepared else PreparedLoader(loader, self, sp_size)

        return prepare_data_loader

    def building(build: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_deepspeed(self: Any, *args: Any) -> Any:
            if sp_size_of(self) > 1 and self.deepspeed_plugin.deepspeed_config.get("train_batch_size") == "auto":
                # accelerate would multiply by all ranks, although the ranks of a sequence share their samples.
                del self.deepspeed_plugin.deepspeed_config["train_batch_size"]
            result = build(self, *args)
            session = getattr(getattr(self.deepspeed_engine_wrapped, "engine", None), "alst", None)
            if session is not None and sp_size_of(self) > 1:
                session.takes_whole = True
            return result

        return prepare_deepspeed

    wrap_once(accelerator_class, "prepare_data_loader", preparing)
    wrap_once(accelerator_class, "_prepare_deepspeed", building)

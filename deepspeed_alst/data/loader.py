"""Sharded data loader: each rank loads its own batches, and the ranks of a sequence process them in turn.

A refill takes one batch per rank. Rank i cuts its batch into P shards and sends shard j to rank j. P micro-steps
follow; in step i all ranks process rank i's batch.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.config.config_file import find_config, near_misses
from deepspeed_alst.data.exchange import BatchExchange, Header
from deepspeed_alst.data.sharding import ShardingConfig
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import ConfigError, DataError

_BATCHES_COMPARED = 4


def shard_dataloader(loader: Any, engine: Any, whole: bool = False) -> Any:
    """Shard the batches of a loader across the ranks of a sequence.

    Every rank's loader must yield its own samples, as under plain data parallelism (a DistributedSampler over all
    ranks). ``len`` is ``len(loader)`` times the SP degree. With ``sequence_parallel_size`` 1 the loader is returned.

    Args:
        loader: a DataLoader, or any iterable of dicts with ``input_ids`` of shape [batch, sequence].
        engine: the engine that ``deepspeed.initialize`` returned.
        whole: yield each rank's batches whole, in turn; the engine splits them (docs/own_losses.md).

    Raises:
        DataError: the ds_config asks for sequence parallelism, but the engine was built before this package was loaded.
        ConfigError: the ds_config has none of this package's keys, but one that is close to them.
    """
    session = getattr(engine, "alst", None)
    if session is not None:
        session.takes_whole |= whole
        return session.shard_dataloader(loader, whole)
    ds_config = find_config({"config": engine.config}) or {}
    if problems := [*near_misses(ds_config)]:
        raise ConfigError("\n".join(problems))
    if (sp_size := ds_config.get("sequence_parallel_size", 1)) != 1:
        raise DataError(
            f"shard_dataloader: the ds_config has sequence_parallel_size={sp_size}, but the engine was built without "
            "this package: `import deepspeed_alst` before deepspeed.initialize"
        )
    return loader


class _Wrapper:
    """Wrapper of a loader, whose other attributes (dataset, sampler, set_epoch, ...) are the inner loader's."""

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet: unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)


class ShardedDataLoader(_Wrapper):
    """Iterable of this rank's shards."""

    def __init__(
        self,
        loader: Any,
        groups: SequenceGroups,
        config: ShardingConfig,
        note: Callable[[int, int], None] | None = None,
        whole: bool = False,
    ) -> None:
        """Wrap a loader; ``note(rank, number)`` is called before each micro-step, ``whole`` leaves batches uncut."""
        self.loader, self._groups, self._note = loader, groups, note
        self._exchange = BatchExchange(groups, config, whole)
        self.num_pending = 0
        """Micro-steps left of batches that the inner loaders have counted as done."""

    def __len__(self) -> int:
        """Return the micro-steps in an epoch, if all ranks of a sequence have loaders of equal length."""
        return len(self.loader) * self._groups.sp_size

    @property
    def state_dict(self) -> Callable[..., Any]:
        """Inner loader's ``state_dict``, if it has one; it raises DataError within a refill."""
        return functools.partial(self._state_dict, self.loader.state_dict)

    def _state_dict(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        P = self._groups.sp_size
        if self.num_pending:
            raise DataError(
                f"state_dict: {self.num_pending} of {P} micro-steps are still to come of batches that the data loader "
                f"counts as done, and would be lost on resuming. Take it after every {P}th micro-step: at the end of "
                f"an optimizer step, if gradient_accumulation_steps is a multiple of {P}"
            )
        return inner(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over one epoch; raise DataError on all ranks if any rank has an error."""
        batches, first_refills = _own_batches(self.loader), list[list[Header]]()
        self.num_pending = 0
        for number in itertools.count():
            header, shards, error = self._exchange.prepare(batches)
            everyone = self._exchange.gather(header, error)
            ends = self._stop(everyone)
            if len(first_refills) < _BATCHES_COMPARED:
                first_refills += [] if ends else [everyone]
                if len(first_refills) == _BATCHES_COMPARED or (ends and first_refills):
                    self._check_own_samples(first_refills)
            if ends:
                return
            turns = [rank for rank in self._groups.ranks if not everyone[rank].ended]
            self.num_pending = len(turns)
            at_end = getattr(self.loader, "end_of_dataloader", False)
            for rank, batch in zip(turns, self._exchange.send(shards, everyone), strict=True):
                self.num_pending -= 1
                if self._note is not None:
                    self._note(rank, number)
                if at_end:
                    # accelerate sets it at the last batch: each of its P micro-steps would be an optimizer step.
                    self.loader.end_of_dataloader = self.num_pending == 0
                yield batch

    def _stop(self, everyone: list[Header]) -> bool:
        """Return True if the epoch is over, on all replicas at once: ZeRO's collectives need every rank."""
        P = self._groups.sp_size
        steps = [sum(not h.ended for h in everyone[first : first + P]) for first in range(0, len(everyone), P)]
        if len(set(steps)) > 1 and dist.get_rank() == 0:
            left = [rank for rank, header in enumerate(everyone) if not header.ended]
            warnings.warn(
                f"data-parallel replicas ran out of samples at different times (micro-steps left: {steps}). The epoch "
                f"ends here for all; at least one batch of ranks {left} is not trained on. Give every rank the same "
                "number of batches, for example by torch's DistributedSampler.",
                stacklevel=3,
            )
        return len(set(steps)) > 1 or not any(steps)

    def _check_own_samples(self, refills: list[list[Header]]) -> None:
        """Raise DataError on all ranks if those of any sequence get the same samples; few or constant ones warn."""
        P, rank = self._groups.sp_size, dist.get_rank()
        for first in range(0, len(refills[0]), P) if P > 1 else ():
            batches = [[header.digest for header in refill[first : first + P]] for refill in refills]
            if any(len(set(batch)) > 1 for batch in batches):
                continue
            if len(batches) == _BATCHES_COMPARED and len({batch[0] for batch in batches}) > 1:
                raise DataError(
                    f"the first {_BATCHES_COMPARED} batches are the same on all {P} ranks of a sequence: the loader's "
                    f"{type(getattr(self.loader, 'sampler', self.loader)).__name__} gives every rank the same samples, "
                    f"so each would be trained {P} times. Use torch.utils.data.DistributedSampler(dataset, "
                    "num_replicas=dist.get_world_size(), rank=dist.get_rank())."
                )
            if rank == first:
                warnings.warn("all ranks of a sequence get the same samples; is the dataset that small?", stacklevel=3)


def _own_batches(loader: Any) -> Iterator[Any]:
    # A generator defers an error of iter(loader) itself to the first next(), where it is caught.
    yield from loader


class PreparedLoader(_Wrapper):
    """Loader prepared by accelerate, whose batches the engine shards; it may be created after this wrapper.

    In training each batch goes whole to all ranks of a sequence, in turn, so that a program may generate from it. In
    evaluation each rank has its own batches.
    """

    alst_whole = True

    def __init__(self, loader: Any, accelerator: Any, sp_size: int) -> None:
        self.loader, self._accelerator, self._sp_size = loader, accelerator, sp_size
        self._turns = sp_size

    def __len__(self) -> int:
        """Return the batches of an epoch: this rank's own in evaluation, all of its sequence's ranks in training."""
        return len(self.loader) * self._turns

    def __iter__(self) -> Iterator[Any]:
        """Iterate over one epoch, of training or evaluation by the model's mode."""
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

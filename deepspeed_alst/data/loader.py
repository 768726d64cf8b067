"""Sharded data loader: each rank loads its own batches, and the ranks of a sequence process them in turn.

A refill takes one batch per rank. Rank i cuts its batch into P shards and sends shard j to rank j, so that no rank ever
holds another rank's whole sample. P micro-steps follow; in step i all ranks process rank i's batch. The exchange runs
on the host over gloo: 24 bytes per token are small next to the compute of a long sequence.
"""

import dataclasses
import functools
import itertools
import pickle
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.data.message import Header, digest_of, layout, message_of, tokens_of, view
from deepspeed_alst.data.own_samples import BATCHES_COMPARED, check_own_samples, num_samples
from deepspeed_alst.data.sharding import shard_batch, uncut
from deepspeed_alst.data.validation import Vocabulary, checked, warn_of_padding
from deepspeed_alst.distributed.collectives import gather_objects, name_missing_ranks
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import AlstError, DataError


def shard_dataloader(loader: Any, engine: Any) -> Any:
    """Shard the batches of a loader across the ranks of a sequence.

    Every rank's loader must yield its own samples, as under plain data parallelism (a DistributedSampler over all
    ranks). ``len`` is ``len(loader)`` times the SP degree. With ``sequence_parallel_size`` 1 the loader is returned as
    it is, so that a program can keep this line in its comparison without sequence parallelism.

    Args:
        loader: a DataLoader, or any iterable of dicts with ``input_ids`` of shape [batch, sequence].
        engine: the engine that ``deepspeed.initialize`` returned.

    Raises:
        DataError: the ds_config asks for sequence parallelism, but the engine was built before this package was loaded.
    """
    session = getattr(engine, "alst", None)
    if session is not None:
        return session.shard_dataloader(loader)
    sp_size = engine.config.get("sequence_parallel_size", 1) if isinstance(engine.config, dict) else 1
    if sp_size != 1:
        raise DataError(
            f"shard_dataloader: the ds_config has sequence_parallel_size={sp_size}, but the engine was built without "
            "this package: `import deepspeed_alst` before deepspeed.initialize"
        )
    return loader


class ShardedDataLoader:
    """Iterable of this rank's shards; other attributes (dataset, sampler, set_epoch, ...) are the inner loader's."""

    def __init__(
        self,
        loader: Any,
        groups: SequenceGroups,
        multiple: int,
        packing: bool = False,
        marks_padding: bool = False,
        vocabulary: Vocabulary | None = None,
        note: Callable[[int, int], None] | None = None,
        by_lowest: bool = False,
        whole: bool = False,
    ) -> None:
        """Wrap a loader; ``note(rank, number)`` is called before each micro-step, ``whole`` leaves batches uncut."""
        self.loader = loader
        self._groups = groups
        self._multiple = multiple
        self._packing = packing
        self._marks_padding = marks_padding
        self._vocabulary = vocabulary or Vocabulary()
        self._note = note
        self._by_lowest, self._whole = by_lowest, whole
        self.num_pending = 0
        """Micro-steps left of batches that the inner loaders have counted as done."""

    def __len__(self) -> int:
        """Return the micro-steps in an epoch, if all ranks of a sequence have loaders of equal length."""
        return len(self.loader) * self._groups.sp_size

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet: unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    @property
    def state_dict(self) -> Callable[..., Any]:
        """Inner loader's ``state_dict``, if it has one: this rank's position in its own data.

        The function raises DataError between the micro-steps of one refill, whose batches the state counts as done.
        """
        inner = self.loader.state_dict

        @functools.wraps(inner)
        def state_dict(*args: Any, **kwargs: Any) -> Any:
            P = self._groups.sp_size
            if self.num_pending:
                raise DataError(
                    f"state_dict: {self.num_pending} of {P} micro-steps are still to come of batches that the data "
                    f"loader counts as done; resumed from here they would be lost. Take it after every {P}th "
                    f"micro-step: where a step ends, with gradient_accumulation_steps a multiple of {P}"
                )
            return inner(*args, **kwargs)

        return state_dict

    def __iter__(self) -> Iterator[Any]:
        """Iterate over one epoch.

        Raises:
            DataError: on all ranks if any rank has an error.
        """
        batches = _own_batches(self.loader)
        digests: list[list[str]] = []
        num_seen = self.num_pending = 0
        for number in itertools.count():
            header, message, error = self._next_header(batches, num_seen)
            num_seen = header.num_seen
            with name_missing_ranks(self._groups.roll_group):
                everyone = gather_objects(header, self._groups.control_group)
            _raise_first(error, everyone)
            if self._stop(everyone):
                if 0 < len(digests) < BATCHES_COMPARED:
                    check_own_samples(digests, everyone, self._groups.sp_size)
                return
            if len(digests) < BATCHES_COMPARED:
                digests.append([each.digest for each in everyone])
                if len(digests) == BATCHES_COMPARED:
                    check_own_samples(digests, everyone, self._groups.sp_size)
            headers = [everyone[rank] for rank in self._groups.ranks]
            turns = [rank for rank, header in zip(self._groups.ranks, headers, strict=True) if not header.ended]
            self.num_pending = len(turns)
            at_end = getattr(self.loader, "end_of_dataloader", False)
            for rank, batch in zip(turns, self._exchange(message, headers), strict=True):
                self.num_pending -= 1
                if self._note is not None:
                    self._note(rank, number)
                if at_end:
                    # accelerate sets it at the last batch: each of its P micro-steps would be an optimizer step.
                    self.loader.end_of_dataloader = self.num_pending == 0
                yield batch

    def _next_header(
        self, batches: Iterator[Any], num_seen: int
    ) -> tuple[Header, torch.Tensor | None, BaseException | None]:
        """Return this rank's next batch, cut; an error is kept for the exchange, where the other ranks wait."""
        try:
            batch = next(batches)
        except StopIteration:
            return Header(ended=True, num_seen=num_seen), None, None
        except Exception as error:
            return Header(error=f"the data loader raised {type(error).__name__}: {error}"), None, error
        return self._header_of(batch, num_seen)

    def exchange(self, batch: Any, place: str = "") -> list[Any]:
        """Exchange one batch per rank; return this rank's shards of its sequence's batches, in rank order.

        Raises:
            DataError: on all ranks if any rank has an error, or if the ranks are at different places.
        """
        header, message, error = self._header_of(batch, 0)
        everyone = self._meet(dataclasses.replace(header, place=place), error)
        return list(self._exchange(message, [everyone[rank] for rank in self._groups.ranks]))

    def meet(self, place: str) -> None:
        """Check that all ranks are at the same place, where they have no batch.

        Raises:
            DataError: on all ranks if some are not.
        """
        self._meet(Header(place=place), None)

    def _meet(self, header: Header, error: BaseException | None) -> list[Header]:
        with name_missing_ranks(self._groups.roll_group):
            everyone = gather_objects(header, self._groups.control_group)
        _raise_first(error, everyone)
        places = [each.place for each in everyone]
        if len(set(places)) > 1:
            where = "; ".join(f"rank {rank}: {place}" for rank, place in enumerate(places))
            raise DataError(
                f"the ranks' data are not of the same length ({where}). Give every rank as many batches: a dataset "
                "that yields each rank's own samples must yield as many on all of them"
            )
        return everyone

    def cut(self, batch: Any) -> Any:
        """Return this rank's shard of a batch that all ranks of its sequence have.

        Raises:
            DataError: on all ranks if any rank has an error.
        """
        header, message, error = self._header_of(batch, 0)
        with name_missing_ranks(self._groups.roll_group):
            _raise_first(error, gather_objects(header, self._groups.control_group))
        assert message is not None
        piece, device = message.view(self._groups.sp_size, -1)[self._groups.sp_rank], tokens_of(batch).device
        return {**header.values, **{spec.key: view(piece, spec).clone().to(device) for spec in header.specs}}

    def _header_of(self, batch: Any, num_seen: int) -> tuple[Header, torch.Tensor | None, BaseException | None]:
        """Return a batch's header and its bytes, a part for each rank; or the error."""
        try:
            whole, P = checked(batch, self._vocabulary), self._groups.sp_size
            if self._whole:
                sharded = uncut(whole, P)
            else:
                sharded = shard_batch(whole, P, self._multiple, self._packing, self._marks_padding, self._by_lowest)
                warn_of_padding(tokens_of(whole).shape[1], tokens_of(sharded.shards[0]).shape[1] * P, self._multiple)
            specs, num_bytes = layout(sharded)
            kind = type(batch) if isinstance(batch, UserDict) else dict
            message = message_of(sharded, specs, num_bytes)
            header = Header(
                kind=kind,
                specs=specs,
                num_bytes=num_bytes,
                values={key: x for key, x in sharded.common.items() if not isinstance(x, torch.Tensor)},
                digest=digest_of(sharded),
                num_seen=num_seen + tokens_of(sharded.shards[0]).shape[0],
                num_samples=num_samples(self.loader),
                sampler=type(getattr(self.loader, "sampler", self.loader)).__name__,
            )
            # Pickling errors must occur here: during the exchange they would stop some ranks alone.
            kind(pickle.loads(pickle.dumps(header)).values)
        except AlstError as error:
            return Header(error=str(error)), None, error
        except Exception as error:
            return Header(error=f"a batch cannot be sent to the other ranks: {error!r}"), None, error
        return header, message, None

    def _stop(self, everyone: list[Header]) -> bool:
        """Return True if the epoch is over, on all replicas at once: ZeRO's collectives need every rank."""
        P = self._groups.sp_size
        steps = [sum(not h.ended for h in everyone[first : first + P]) for first in range(0, len(everyone), P)]
        if len(set(steps)) > 1 and dist.get_rank() == 0:
            left = [rank for rank, header in enumerate(everyone) if not header.ended]
            warnings.warn(
                f"data-parallel replicas ran out of samples at different times (micro-steps left: {steps}). The epoch "
                f"ends here for all; at least one batch of ranks {left} is not trained on. Give every rank as many "
                "batches, e.g. with torch's DistributedSampler.",
                stacklevel=3,
            )
        return len(set(steps)) > 1 or not any(steps)

    def _exchange(self, message: torch.Tensor | None, headers: list[Header]) -> Iterator[Any]:
        """Run one all-to-all of bytes, then yield a micro-batch for each rank that had one."""
        mine = headers[self._groups.sp_rank]
        send = torch.empty(0, dtype=torch.uint8) if message is None else message
        recv = torch.empty(sum(header.num_bytes for header in headers), dtype=torch.uint8)
        with name_missing_ranks(self._groups.roll_group):
            dist.all_to_all_single(
                recv,
                send,
                [header.num_bytes for header in headers],
                [mine.num_bytes] * self._groups.sp_size,
                group=self._groups.sp_control_group,
            )
        first = 0
        for header in headers:
            piece = recv[first : first + header.num_bytes]
            first += header.num_bytes
            if not header.ended:
                tensors = {spec.key: view(piece, spec).clone() for spec in header.specs}
                yield header.kind({**tensors, **header.values})


def _own_batches(loader: Any) -> Iterator[Any]:
    # A generator defers an error of iter(loader) itself to the first next(), where it is caught.
    yield from loader


def _raise_first(error: BaseException | None, everyone: list[Header]) -> None:
    """Raise on every rank if any rank had an error: its own if it had one, else the first rank's."""
    failed = [(rank, header.error) for rank, header in enumerate(everyone) if header.error is not None]
    if error is not None:
        raise DataError(everyone[dist.get_rank()].error) from error
    if failed:
        raise DataError("rank {}: {}".format(*failed[0]))

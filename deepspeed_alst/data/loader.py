"""P samples in, P micro-steps out: every rank's loader yields its own batches, and the ranks of a sequence take turns.

A refill takes one batch of each rank. Rank i cuts its batch into P shards and sends shard j to rank j, so that no rank
ever holds another's whole sample; then come P micro-steps, in step i all ranks work on rank i's batch. The exchange
runs on the host over gloo: 24 bytes a token are little beside the compute of a long sequence.
"""

import hashlib
import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.data.shard import ShardedBatch, shard_batch
from deepspeed_alst.errors import AlstError, DataError
from deepspeed_alst.parallel.agreement import gather_objects
from deepspeed_alst.parallel.groups import SequenceGroups

# Every tensor of a message starts at a multiple of the widest dtype, so that its bytes can be viewed in place.
_ALIGNMENT = 16
_BATCHES_COMPARED = 4


def shard_dataloader(loader: Any, engine: Any) -> "ShardedDataLoader":
    """Split the batches of a loader over the ranks that share a sequence.

    Every rank's loader must yield its own samples, as under plain data parallelism (a DistributedSampler over all
    ranks). ``len`` is ``len(loader)`` times the SP degree.

    Args:
        loader: a DataLoader, or any iterable of dicts with ``input_ids`` of shape [batch, sequence].
        engine: what ``deepspeed.initialize`` returned.

    Raises:
        DataError: the engine was not built with this package's keys.
    """
    session = getattr(engine, "alst", None)
    if session is None:
        raise DataError(
            "shard_dataloader: this engine runs without sequence parallelism; set sequence_parallel_size in the "
            "ds_config that deepspeed.initialize is given"
        )
    return session.shard_dataloader(loader)


@dataclass(frozen=True)
class _TensorSpec:
    """A tensor on the way: where it stands in the message, and what it is."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Header:
    """What a rank says about its next batch before the bytes travel."""

    error: str | None = None
    ended: bool = False
    specs: tuple[_TensorSpec, ...] = ()
    num_bytes: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    digest: str = ""
    num_seen: int = 0
    """Samples this rank has taken in this epoch, this batch included."""


class ShardedDataLoader:
    """An iterable of this rank's shards; everything else (dataset, sampler, set_epoch, ...) is the inner loader's."""

    def __init__(self, loader: Any, groups: SequenceGroups, multiple: int) -> None:
        self.loader = loader
        self._groups = groups
        self._multiple = multiple

    def __len__(self) -> int:
        """Micro-steps in an epoch."""
        return len(self.loader) * self._groups.sp_size

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # not set yet: unpickling
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        """Start an epoch.

        Raises:
            DataError: on all ranks, whichever of them saw the reason.
        """
        batches = _own_batches(self.loader)
        digests: list[list[str]] = []
        num_seen = 0
        while True:
            header, sharded, wrap, error = self._next_header(batches, num_seen)
            num_seen = header.num_seen
            everyone = gather_objects(header, self._groups.control_group)
            _raise_first(error, everyone)
            mine = [everyone[rank] for rank in self._groups.ranks]
            if self._stop(everyone):
                return
            if len(digests) < _BATCHES_COMPARED:
                digests.append([each.digest for each in mine])
                if len(digests) == _BATCHES_COMPARED:
                    self._check_own_samples(digests, mine[0].num_seen)
            yield from self._exchange(sharded, mine, wrap)

    def _next_header(
        self, batches: Iterator[Any], num_seen: int
    ) -> tuple[_Header, ShardedBatch | None, Callable[[dict], Any], BaseException | None]:
        """This rank's next batch, cut; an error of the user's dataset or collator is kept for the exchange."""
        try:
            batch = next(batches)
        except StopIteration:
            return _Header(ended=True, num_seen=num_seen), None, dict, None
        except Exception as error:
            return _Header(error=f"the data loader raised {type(error).__name__}: {error}"), None, dict, error
        try:
            sharded = shard_batch(batch, self._groups.sp_size, self._multiple)
        except AlstError as error:
            return _Header(error=str(error)), None, dict, error
        # BatchEncoding and its kind have methods of their own (.to), which programs use.
        wrap = type(batch) if isinstance(batch, UserDict) else dict
        specs, num_bytes = _layout(sharded)
        anchor = sharded.shards[0]["position_ids"]
        header = _Header(
            specs=specs,
            num_bytes=num_bytes,
            values={key: x for key, x in sharded.common.items() if not isinstance(x, torch.Tensor)},
            digest=_digest(sharded),
            num_seen=num_seen + anchor.shape[-2],
        )
        return header, sharded, wrap, None

    def _stop(self, everyone: list[_Header]) -> bool:
        """Whether the epoch is over: for all replicas at once, since ZeRO's collectives need every one of them."""
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

    def _check_own_samples(self, digests: list[list[str]], num_seen: int) -> None:
        """Refuse a sampler that gives every rank of a sequence the same samples: each would be trained P times."""
        if self._groups.sp_size == 1 or any(len(set(per_rank)) > 1 for per_rank in digests):
            return
        try:
            num_samples = len(self.loader.dataset)
        except (TypeError, AttributeError):
            # An iterable that has not ended yet has more.
            num_samples = num_seen + 1
        constant = len({digest for per_rank in digests for digest in per_rank}) == 1
        if num_samples <= num_seen or constant:
            if dist.get_rank() == 0:
                warnings.warn(
                    "all ranks of a sequence are given the same samples; is the dataset that small?", stacklevel=4
                )
            return
        sampler = type(getattr(self.loader, "sampler", self.loader)).__name__
        raise DataError(
            f"the first {_BATCHES_COMPARED} batches are the same on all {self._groups.sp_size} ranks of a sequence: "
            f"the loader's {sampler} gives every rank the same samples, so each would be trained "
            f"{self._groups.sp_size} times. Use torch.utils.data.DistributedSampler(dataset, "
            "num_replicas=dist.get_world_size(), rank=dist.get_rank())."
        )

    def _exchange(
        self, sharded: ShardedBatch | None, headers: list[_Header], wrap: Callable[[dict], Any]
    ) -> Iterator[Any]:
        """One all-to-all of bytes; then a micro-batch for each rank that had one."""
        mine = headers[self._groups.sp_rank]
        send = torch.zeros(mine.num_bytes * self._groups.sp_size, dtype=torch.uint8)
        if sharded is not None:
            for rank, piece in enumerate(send.view(self._groups.sp_size, -1)):
                for spec in mine.specs:
                    x = sharded.shards[rank][spec.key] if spec.key in sharded.shards[rank] else sharded.common[spec.key]
                    _view(piece, spec).copy_(x)
        recv = torch.empty(sum(header.num_bytes for header in headers), dtype=torch.uint8)
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
                tensors = {spec.key: _view(piece, spec).clone() for spec in header.specs}
                yield wrap({**tensors, **header.values})


def _own_batches(loader: Any) -> Iterator[Any]:
    # A generator, so that an error of iter(loader) itself comes out of the first next(), where it is caught.
    yield from loader


def _raise_first(error: BaseException | None, everyone: list[_Header]) -> None:
    """Raise on every rank if any rank had an error: its own where it had one, else the first rank's."""
    for rank, header in enumerate(everyone):
        if header.error is not None:
            raise DataError(header.error if error else f"rank {rank}: {header.error}") from error


def _layout(sharded: ShardedBatch) -> tuple[tuple[_TensorSpec, ...], int]:
    """Where each tensor of a shard stands in the message; the same for all shards of a batch."""
    specs, offset = [], 0
    common = {key: x for key, x in sharded.common.items() if isinstance(x, torch.Tensor)}
    for key, x in {**sharded.shards[0], **common}.items():
        specs.append(_TensorSpec(key, x.dtype, tuple(x.shape), offset))
        offset += -(-x.numel() * x.element_size() // _ALIGNMENT) * _ALIGNMENT
    return tuple(specs), offset


def _view(piece: torch.Tensor, spec: _TensorSpec) -> torch.Tensor:
    """The bytes of one tensor in a message, as that tensor."""
    numel = 1
    for size in spec.shape:
        numel *= size
    return piece[spec.offset : spec.offset + numel * spec.dtype.itemsize].view(spec.dtype).view(spec.shape)


def _digest(sharded: ShardedBatch) -> str:
    """A fingerprint of a batch's tokens."""
    digest = hashlib.blake2b(digest_size=16)
    key = "input_ids" if "input_ids" in sharded.shards[0] else "inputs_embeds"
    for shard in sharded.shards:
        digest.update(shard[key].detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

"""Exchange of batches between the ranks of a sequence, on the host over gloo: 24 bytes per token."""

import io
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.data.sharding import ShardingConfig, fingerprint, shard_batch, uncut
from deepspeed_alst.data.validation import checked
from deepspeed_alst.distributed.collectives import gather_objects, name_missing_ranks
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import AlstError, DataError

_NO_BYTES = torch.empty(0, dtype=torch.uint8)


@dataclass
class Header:
    """Description of a rank's next batch, exchanged before its bytes."""

    error: str | None = None
    ended: bool = False
    sizes: tuple[int, ...] = ()  # bytes for each rank of the sequence
    digest: int = 0
    place: str = ""  # in this rank's data, equal on all ranks; empty if not counted


class BatchExchange:
    """Exchange of the batches of all ranks: each gets its shards of those of its sequence.

    Args:
        groups: the ranks.
        config: form of the shards.
        whole: give the ranks of a sequence each batch whole.
    """

    def __init__(self, groups: SequenceGroups, config: ShardingConfig, whole: bool = False) -> None:
        self._groups, self._config, self._whole = groups, config, whole

    def exchange(self, batch: Any, place: str = "") -> list[Any]:
        """Exchange one batch per rank; return this rank's shards of its sequence's batches, in rank order."""
        header, shards, error = self.prepare(iter([batch]))
        header.place = place
        return list(self.send(shards, self.gather(header, error)))

    def meet(self, place: str) -> None:
        """Raise DataError on all ranks if they are not at the same place, where they have no batch."""
        self.gather(Header(place=place))

    def prepare(self, batches: Iterator[Any]) -> tuple[Header, list[torch.Tensor], BaseException | None]:
        """Cut the next batch and pack its shards, ``[P]``; an error is kept for the exchange, where others wait."""
        P = self._groups.sp_size
        try:
            batch = next(batches)
        except StopIteration:
            return Header(ended=True, sizes=(0,) * P), [], None
        except Exception as error:
            return Header(error=f"the data loader raised {type(error).__name__}: {error}"), [], error
        try:
            whole = checked(batch, self._config.vocabulary)
            sharded = uncut(whole, P) if self._whole else shard_batch(whole, P, self._config)
            # BatchEncoding and similar types have methods (.to) that programs use.
            kind = type(batch) if isinstance(batch, UserDict) else dict
            shards = [_packed(kind({**shard, **sharded.common})) for shard in sharded.shards]
            # Errors of unpickling must occur here: after the exchange they would stop some ranks alone.
            _unpacked(shards[0])
            header = Header(
                sizes=tuple(map(len, shards)),
                digest=fingerprint(*(x for x in whole.values() if isinstance(x, torch.Tensor) and x.dim())),
            )
        except AlstError as error:
            return Header(error=str(error)), [], error
        except Exception as error:
            return Header(error=f"a batch cannot be sent to the other ranks: {error!r}"), [], error
        return header, shards, None

    def gather(self, header: Header, error: BaseException | None = None) -> list[Header]:
        """Gather all ranks' headers; raise on every rank if any has an error, or is at another place."""
        with name_missing_ranks(self._groups.roll_group):
            everyone = gather_objects(header, self._groups.control_group)
        if error is not None:
            raise DataError(header.error) from error
        for rank, each in enumerate(everyone):
            if each.error is not None:
                raise DataError(f"rank {rank}: {each.error}")
        places = [each.place for each in everyone]
        if len(set(places)) > 1:
            where = "; ".join(f"rank {rank}: {place}" for rank, place in enumerate(places))
            raise DataError(
                f"the ranks have different numbers of batches ({where}). A dataset that yields each rank's own samples "
                "must yield the same number on all ranks"
            )
        return everyone

    def send(self, shards: list[torch.Tensor], everyone: list[Header]) -> Iterator[Any]:
        """Run one all-to-all of bytes, then yield a micro-batch for each rank that had one."""
        group, ranks = self._groups.sp_control_group, self._groups.ranks
        sizes = [everyone[rank].sizes[self._groups.sp_rank] for rank in ranks]
        send, recv = torch.cat([_NO_BYTES, *shards]), torch.empty(sum(sizes), dtype=torch.uint8)
        with name_missing_ranks(self._groups.roll_group):
            dist.all_to_all_single(recv, send, sizes, list(everyone[dist.get_rank()].sizes), group=group)
        yield from (_unpacked(piece) for piece in recv.split(sizes) if len(piece))


def _packed(batch: Any) -> torch.Tensor:
    """Return the bytes of a batch as a tensor."""
    for key, x in batch.items():
        if isinstance(x, torch.Tensor):
            batch[key] = x.detach().cpu().clone()  # a view would be saved with all that it is a view of
    file = io.BytesIO()
    torch.save(batch, file)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8)


def _unpacked(data: torch.Tensor) -> Any:
    return torch.load(io.BytesIO(data.numpy()), weights_only=False)

"""Process groups: P = sp_size consecutive ranks, thus of one node, form a sequence-parallel group."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from deepspeed_alst.distributed.roll_call import world_timeout


def sequence_ranks(world_size: int, sp_size: int) -> list[list[int]]:
    """Return the ranks of each SP group: ``[[0..P-1], [P..2P-1], ...]``, one list per data-parallel replica."""
    assert world_size % sp_size == 0, (world_size, sp_size)
    return [list(range(first, first + sp_size)) for first in range(0, world_size, sp_size)]


@dataclass(frozen=True)
class SequenceGroups:
    """Process groups of one engine, as seen by this rank."""

    sp_size: int
    sp_rank: int
    dp_size: int
    dp_rank: int
    sp_group: Any
    """Ranks of this rank's sequence, on the device's backend: attention and loss."""
    world_group: Any
    """All ranks, on the device's backend: ZeRO sharding and reduction."""
    self_group: Any
    """This rank alone, as DeepSpeed's model-parallel group: for None, DeepSpeed uses the world."""
    sp_control_group: Any
    """Ranks of this rank's sequence over gloo: batches on the host."""
    control_group: Any
    """All ranks over gloo: agreement on sizes and errors, independent of devices."""
    roll_group: Any
    """All ranks over gloo: detection of missing ranks after a failed collective."""

    @property
    def ranks(self) -> list[int]:
        """Global ranks of this rank's sequence, in sequence order."""
        return sequence_ranks(self.dp_size * self.sp_size, self.sp_size)[self.dp_rank]

    def destroy(self) -> None:
        """Give the process groups back; the object is of no use afterwards."""
        destroy_groups(self.sp_group, self.world_group, self.self_group, self.sp_control_group)
        destroy_groups(self.control_group, self.roll_group)


def destroy_groups(*groups: Any) -> None:
    """Destroy process groups; one that is gone already, with the world, is skipped."""
    for group in groups:
        with contextlib.suppress(ValueError, AssertionError, KeyError):
            dist.destroy_process_group(group)


def build_control_group() -> Any:
    """Build a gloo group of all ranks for control decisions. Collective over the world."""
    return dist.new_group(list(range(dist.get_world_size())), backend="gloo", timeout=world_timeout())


def build_groups(sp_size: int, control_group: Any) -> SequenceGroups:
    """Build the groups of one engine. Collective over the world; the SP degree must divide it (checked before)."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mine: dict[str, Any] = {}
    # The same timeout for all groups: the longest would delay the detection of a lost rank.
    new_group = functools.partial(dist.new_group, timeout=world_timeout())
    for ranks in sequence_ranks(world_size, sp_size):
        sp_group, sp_control_group = new_group(ranks), new_group(ranks, backend="gloo")
        if rank in ranks:
            mine = {"sp_group": sp_group, "sp_control_group": sp_control_group}
    # Collective, as local synchronization names groups by number, which repeats after destroy().
    self_groups = [new_group([each]) for each in range(world_size)]
    return SequenceGroups(
        sp_size=sp_size,
        sp_rank=rank % sp_size,
        dp_size=world_size // sp_size,
        dp_rank=rank // sp_size,
        world_group=new_group(list(range(world_size))),
        self_group=self_groups[rank],
        control_group=control_group,
        roll_group=build_control_group(),
        **mine,
    )

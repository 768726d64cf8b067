"""Who shares a sequence and who holds a replica: P = sp_size consecutive ranks, so of one node, share one sequence."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from deepspeed_alst.parallel.roll_call import world_timeout


def sequence_ranks(world_size: int, sp_size: int) -> list[list[int]]:
    """The ranks of each SP group: ``[[0..P-1], [P..2P-1], ...]``, one list for each data-parallel replica."""
    assert world_size % sp_size == 0, (world_size, sp_size)
    return [list(range(first, first + sp_size)) for first in range(0, world_size, sp_size)]


@dataclass(frozen=True)
class SequenceGroups:
    """The process groups of one engine, as this rank sees them."""

    sp_size: int
    sp_rank: int
    dp_size: int
    dp_rank: int
    sp_group: Any
    """The ranks of this rank's sequence, on the device's backend: attention and loss."""
    world_group: Any
    """All ranks on the device's backend: what ZeRO shards and reduces over."""
    self_group: Any
    """This rank alone: DeepSpeed asks for a model-parallel group, and None makes it take the world."""
    sp_control_group: Any
    """The ranks of this rank's sequence over gloo: batches on the host."""
    control_group: Any
    """All ranks over gloo: agreements on sizes and errors, which need no device."""
    roll_group: Any
    """All ranks over gloo: who is still there, after a collective has failed."""

    @property
    def ranks(self) -> list[int]:
        """Global ranks of this rank's sequence, in the sequence's order."""
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
    """All ranks over gloo, on which they agree whether to go on. Collective over the world."""
    return dist.new_group(list(range(dist.get_world_size())), backend="gloo", timeout=world_timeout())


def build_groups(sp_size: int, control_group: Any) -> SequenceGroups:
    """Build the groups of one engine. Collective over the world; the SP degree must divide it (checked before)."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    mine: dict[str, Any] = {}
    # One limit for all: where some waited longer, a lost rank would be noticed as late as the longest says.
    new_group = functools.partial(dist.new_group, timeout=world_timeout())
    for ranks in sequence_ranks(world_size, sp_size):
        sp_group, sp_control_group = new_group(ranks), new_group(ranks, backend="gloo")
        if rank in ranks:
            mine = {"sp_group": sp_group, "sp_control_group": sp_control_group}
    # All ranks make all of them: local synchronisation names groups by their number, which repeats after destroy().
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

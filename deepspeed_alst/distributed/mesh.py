"""Process groups of an engine, as the model-parallel unit (mpu) that DeepSpeed expects.

DeepSpeed is told that the SP degree is 1 and that its ZeRO world is all ranks: with the real degree it divides
gradients by world / SP on some paths, by world on others (deepspeed 0.19.8: stage3.py:1878,
coalesced_collectives.py:124). The loss compensates (distributed/sequence_loss.py).
"""

import atexit
import contextlib
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist

from deepspeed_alst.distributed.collectives import gather_objects, world_timeout

_EXIT_SECONDS = 0.2  # a worker needs microseconds, but the machine may be busy: 40 processes on 2 cores, 0.1 s


@dataclass(frozen=True)
class SequenceGroups:
    """Process groups of one engine, as seen by this rank; sp_size consecutive ranks share a sequence."""

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
        return list(range(self.dp_rank * self.sp_size, (self.dp_rank + 1) * self.sp_size))

    def destroy(self) -> None:
        """Destroy the process groups."""
        groups = self.sp_group, self.world_group, self.self_group, self.sp_control_group
        destroy_groups(*groups, self.control_group, self.roll_group)

    def as_mpu(self) -> SimpleNamespace:
        """Return the groups as DeepSpeed's mpu: functions ``get_...`` without arguments.

        It has ``initialize_sequence_parallel``, by which DeepSpeed tells a Ulysses mpu from Megatron's, and no
        ``get_data_parallel_group``, over which ZeRO-3 would shard and reduce instead of the world.
        """
        answers = {
            "model_parallel_rank": 0,
            "model_parallel_world_size": 1,
            "model_parallel_group": self.self_group,
            "tensor_model_parallel_rank": 0,
            "tensor_model_parallel_world_size": 1,
            "tensor_model_parallel_group": self.self_group,
            "data_parallel_world_size": self.dp_size,  # train_batch_size = micro batch x accumulation steps x this
            "data_parallel_rank": self.dp_rank,
            "sequence_parallel_world_size": 1,  # for any SP degree: see the module docstring
            "sequence_parallel_rank": self.sp_rank,
            "sequence_parallel_group": self.sp_group,
            "sequence_data_parallel_world_size": self.dp_size * self.sp_size,
            "sequence_data_parallel_rank": self.dp_rank * self.sp_size + self.sp_rank,
            "sequence_data_parallel_group": self.world_group,
        }
        functions = {f"get_{name}": functools.partial(lambda x: x, x) for name, x in answers.items()}
        return SimpleNamespace(initialize_sequence_parallel=None, **functions)


def destroy_groups(*groups: Any) -> None:
    """Destroy process groups; skip one that was destroyed with the world."""
    for group in groups:
        with contextlib.suppress(ValueError, AssertionError, KeyError):
            dist.destroy_process_group(group)


@functools.cache
def _wait_for_gloo_at_exit() -> None:
    """Let gloo's worker threads free the tensors of the last collective before the interpreter ends.

    They need the GIL for it, and Python 3.11 ends a thread that asks for the GIL later, in the middle of a C++
    destructor: "terminate called without an active exception" (torch 2.13, ProcessGroupGloo::runLoop). Destroying
    the groups would join the threads only where nobody refers to them any more.
    """
    atexit.register(time.sleep, _EXIT_SECONDS)


def build_control_group() -> Any:
    """Build a gloo group of all ranks for control decisions. Collective over the world."""
    _wait_for_gloo_at_exit()
    return dist.new_group(backend="gloo", timeout=world_timeout())


def build_adjacent(size: int, backend: str | None = None) -> Any:
    """Build groups of ``size`` consecutive ranks, which divides the world; return this rank's. Collective over it."""
    rows = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
    # The same timeout for all groups: the longest would delay the detection of a lost rank.
    return dist.new_subgroups_by_enumeration(rows, world_timeout(), backend)[0]  # type: ignore[no-untyped-call]


def ranks_of_node(control_group: Any) -> int:
    """Return the ranks of a node, by the launcher's variables; 0 if nodes differ, or do not have adjacent ranks.

    Collective over a gloo group of all ranks.
    """
    size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    is_adjacent = size > 0 and os.environ.get("LOCAL_RANK") == str(dist.get_rank() % size)
    sizes = set(gather_objects(size if is_adjacent else 0, control_group))
    return sizes.pop() if len(sizes) == 1 else 0


def build_groups(sp_size: int, control_group: Any) -> SequenceGroups:
    """Build the groups of one engine. Collective over the world; the SP degree must divide it (checked before)."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    return SequenceGroups(
        sp_size=sp_size,
        sp_rank=rank % sp_size,
        dp_size=world_size // sp_size,
        dp_rank=rank // sp_size,
        sp_group=build_adjacent(sp_size),
        world_group=dist.new_group(list(range(world_size)), timeout=world_timeout()),
        self_group=build_adjacent(1),
        sp_control_group=build_adjacent(sp_size, "gloo"),
        control_group=control_group,
        roll_group=build_control_group(),
    )


@contextlib.contextmanager
def installed(mpu: Any) -> Iterator[None]:
    """Set ``deepspeed.utils.groups.mpu`` in the context: DeepSpeed never resets it, and a second engine inherits it."""
    from deepspeed.utils import groups  # type: ignore[import-untyped]

    before, groups.mpu = groups.mpu, mpu
    try:
        yield
    finally:
        groups.mpu = before

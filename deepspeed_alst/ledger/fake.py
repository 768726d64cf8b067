"""A world of many ranks and tensors without data, on one CPU: models of real size run and a ledger sees what they need.

Only for measuring: whatever depends on a value (a loss, a token's expert) has none.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepspeed_alst.errors import SetupError


@contextmanager
def fake_world(num_ranks: int, rank: int = 0) -> Iterator[FakeTensorMode]:
    """Inside, tensors have no data and this process is one of ``num_ranks``, whose collectives send nothing.

    Open a ledger inside of it, so that it sees operators before the fake mode does.

    Raises:
        SetupError: the process has a world already.
    """
    if dist.is_initialized():
        raise SetupError("fake_world: torch.distributed is initialised already, and a process has one world only")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        with FakeTensorMode() as mode:
            yield mode
    finally:
        dist.destroy_process_group()

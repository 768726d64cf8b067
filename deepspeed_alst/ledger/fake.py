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
def fake_ranks(num_ranks: int, rank: int = 0) -> Iterator[None]:
    """Inside, this process is one of ``num_ranks``, whose collectives send nothing and leave what they find.

    Raises:
        SetupError: the process has a world already.
    """
    if dist.is_initialized():
        raise SetupError("fake_ranks: torch.distributed is initialised already, and a process has one world only")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_world(num_ranks: int, rank: int = 0) -> Iterator[FakeTensorMode]:
    """Fake ranks, and tensors without data.

    Open a ledger inside of it, so that it sees operators before the fake mode does. Build models in their dtype: a fake
    parameter cannot be cast. A transformers model whose attention is not patched makes the mask of all S x S tokens
    here, because it cannot read from position_ids that nothing is packed.

    Raises:
        SetupError: the process has a world already.
    """
    with fake_ranks(num_ranks, rank), FakeTensorMode() as mode:
        yield mode

"""Simulated ranks and fake tensors on one CPU, so that a ledger can measure models of real size.

For measurements only: results that depend on a value (a loss, a token's expert) are undefined.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepspeed_alst.errors import SetupError


@contextmanager
def fake_ranks(num_ranks: int, rank: int = 0) -> Iterator[None]:
    """Run as one of ``num_ranks`` simulated ranks; collectives send nothing and change nothing.

    Raises:
        SetupError: torch.distributed is initialized already.
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
    """Run as one of ``num_ranks`` simulated ranks, with fake tensors.

    Open a ledger inside, so that it sees operators before the fake mode does. Build models in their final dtype: a fake
    parameter cannot be cast. A transformers model whose attention is not patched creates the full S x S mask here,
    because it cannot tell from fake position_ids that no documents are packed.

    Raises:
        SetupError: torch.distributed is initialized already.
    """
    with fake_ranks(num_ranks, rank), FakeTensorMode() as mode:
        yield mode

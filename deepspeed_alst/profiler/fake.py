"""Simulated ranks and fake tensors on one CPU, so that a ledger can measure models of real size.

Results that depend on a value (a loss, a token's expert) are undefined.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_alst.errors import SetupError

aten = torch.ops.aten


@contextmanager
def fake_ranks(num_ranks: int, rank: int = 0) -> Iterator[None]:
    """Run as one of simulated ranks, whose collectives do nothing; SetupError if torch.distributed is in use."""
    if dist.is_initialized():
        raise SetupError("fake_ranks: torch.distributed is initialized already, and a process has one world only")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_world(num_ranks: int, rank: int = 0) -> Iterator[FakeTensorMode]:
    """Run as one of ``num_ranks`` simulated ranks, with fake tensors; SetupError as in ``fake_ranks``.

    Open a ledger inside, so that it sees operators before the fake mode does. Build models in their final dtype: a fake
    parameter cannot be cast. Without patched attention transformers creates the full S x S mask here, because fake
    position_ids may be of packed documents.
    """
    with fake_ranks(num_ranks, rank), FakeTensorMode() as mode:
        yield mode


class Known(TorchDispatchMode):
    """Values that fake tensors lack; open it inside ``fake_world`` and outside the ledger.

    ``nonzero`` finds ``num_labelled`` elements; an element of an integer tensor is ``per_expert``, an expert's tokens.
    """

    def __init__(self, num_labelled: int, per_expert: int = 0) -> None:
        super().__init__()
        self._num_labelled, self._per_expert = num_labelled, per_expert

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is aten.nonzero.default:
            return args[0].new_empty((self._num_labelled, args[0].dim()), dtype=torch.long)
        if func is aten.bincount.default:
            return args[0].new_empty(args[2], dtype=torch.long)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.long: self._per_expert}.get(args[0].dtype, 1.0)
        return func(*args, **(kwargs or {}))

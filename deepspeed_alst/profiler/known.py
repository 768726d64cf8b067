"""Values for operators whose results fake tensors lack: number of labels, tokens per expert."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Known(TorchDispatchMode):
    """Dispatch mode with known values; open it inside fake_world (fake.py) and outside the ledger.

    Args:
        num_labelled: number of elements that ``nonzero`` finds.
        per_expert: value of an element of a fake integer tensor: tokens of one expert.
    """

    def __init__(self, num_labelled: int, per_expert: int = 0) -> None:
        super().__init__()
        self._num_labelled, self._per_expert = num_labelled, per_expert

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.nonzero.default:
            return args[0].new_empty((self._num_labelled, args[0].dim()), dtype=torch.long)
        if func is aten.bincount.default:
            return args[0].new_empty(args[2], dtype=torch.long)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.long: self._per_expert}.get(args[0].dtype, 1.0)
        return func(*args, **kwargs)

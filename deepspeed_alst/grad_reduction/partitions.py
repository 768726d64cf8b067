"""Gradient reduction of DeepSpeed's BF16_Optimizer: ZeRO 1 of a bf16 model with fp32 gradient accumulation.

The optimizer sums micro-steps in flat fp32 buffers, has the engine all-reduce them whole, and reads only its own
partition and the norm. The buffers hold the whole gradient in equal partitions, so one all-to-all to the owners is
enough. The norm is that of the partitions, summed over ranks; the rest of a rank's buffers is zero after the reduction.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.grad_reduction.reduce import Reduction


class Partitions:
    """Gradient partitions of one optimizer, with a flag for averages."""

    def __init__(self, optimizer: Any, reduction: Reduction) -> None:
        self._whole: list[torch.Tensor] = optimizer.fp32_groups_gradients_flat
        self._own: list[torch.Tensor] = optimizer.fp32_groups_gradient_flat_partition
        self._reduction = reduction
        self._group = optimizer.dp_process_group
        self._hold_averages = False

    def reduce(self, grads: Any = None, elements_per_buffer: int | None = None) -> None:
        """Reduce to the owners, in place of ``engine.buffered_allreduce_fallback``."""
        self._reopen()
        r = dist.get_rank(self._group)
        for whole_n, own in zip(self._whole, self._own, strict=True):
            for _ in self._reduction.shard([whole_n], lambda _, own=own: own, False, self._group):
                pass  # written in place
            whole_n[: r * own.numel()].zero_()
            whole_n[(r + 1) * own.numel() :].zero_()
        self._hold_averages = True

    def grads_for_norm(self, for_clipping: bool = False) -> Any:
        """Return the tensors for the norm, in place of ``optimizer.get_grads_for_norm``.

        Covers the whole partition, since it also holds gradients that only other ranks have.
        """
        if for_clipping:
            return self._own
        squares = torch.stack([own.norm() for own in self._own]).square().sum()
        dist.all_reduce(squares, group=self._group)
        return [squares.sqrt()], {}  # its norm is the global norm

    def adding_first(self, add: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``optimizer._update_hp_grad``, which adds a rank's own gradient."""

        @functools.wraps(add)
        def reopen_and_add(*args: Any, **kwargs: Any) -> None:
            self._reopen()
            add(*args, **kwargs)

        return reopen_and_add

    def forgetting_after(self, clear: Callable[[], None]) -> Callable[[], None]:
        """Wrap ``optimizer.clear_hp_grads`` to reset the flag."""

        @functools.wraps(clear)
        def clear_and_forget() -> None:
            clear()
            self._hold_averages = False

        return clear_and_forget

    def _reopen(self) -> None:
        """Scale averages by the world size before another backward: in DeepSpeed every rank contributes them."""
        if self._hold_averages:
            torch._foreach_mul_(self._own, dist.get_world_size(self._group))
        self._hold_averages = False

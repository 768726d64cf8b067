"""The reduction of DeepSpeed's BF16_Optimizer: ZeRO 1 of a bf16 model whose gradients are accumulated in fp32.

It sums micro-steps in flat fp32 buffers, has the engine all-reduce them whole, and reads of them its own partition and
the norm. All of the gradient being there, in equal partitions, one all-to-all to the owners does. The norm is that of
the partitions, added over the ranks; what is not a rank's own partition is zero after the reduction.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.parallel.reduction import Reduction


class Partitions:
    """The partitions of one optimizer, and whether they hold averages."""

    def __init__(self, optimizer: Any, reduction: Reduction) -> None:
        self._whole: list[torch.Tensor] = optimizer.fp32_groups_gradients_flat
        self._own: list[torch.Tensor] = optimizer.fp32_groups_gradient_flat_partition
        self._reduction = reduction
        self._group = optimizer.dp_process_group
        self._hold_averages = False

    def reduce(self, grads: Any = None, elements_per_buffer: int | None = None) -> None:
        """In the place of ``engine.buffered_allreduce_fallback``."""
        self._reopen()
        r = dist.get_rank(self._group)
        for whole_n, own in zip(self._whole, self._own, strict=True):
            for _ in self._reduction.shard([whole_n], lambda _, own=own: own, False, self._group):
                pass  # in its place
            whole_n[: r * own.numel()].zero_()
            whole_n[(r + 1) * own.numel() :].zero_()
        self._hold_averages = True

    def grads_for_norm(self, for_clipping: bool = False) -> Any:
        """In the place of ``optimizer.get_grads_for_norm``.

        All of a partition, and not what has a gradient on this rank: other ranks' are in it too.
        """
        if for_clipping:
            return self._own
        squares = torch.stack([own.norm() for own in self._own]).square().sum()
        dist.all_reduce(squares, group=self._group)
        return [squares.sqrt()], {}  # whose norm is the norm

    def adding_first(self, add: Callable[..., None]) -> Callable[..., None]:
        """Around ``optimizer._update_hp_grad``, which adds a rank's own gradient."""

        @functools.wraps(add)
        def reopen_and_add(*args: Any, **kwargs: Any) -> None:
            self._reopen()
            add(*args, **kwargs)

        return reopen_and_add

    def forgetting_after(self, clear: Callable[[], None]) -> Callable[[], None]:
        """Around ``optimizer.clear_hp_grads``."""

        @functools.wraps(clear)
        def clear_and_forget() -> None:
            clear()
            self._hold_averages = False

        return clear_and_forget

    def _reopen(self) -> None:
        """A further backward before the step: in DeepSpeed's average each rank has the one before as its own part."""
        if self._hold_averages:
            torch._foreach_mul_(self._own, dist.get_world_size(self._group))
        self._hold_averages = False

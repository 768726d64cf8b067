"""Observers of the ledger: operators, storage resizes, sums that autograd adds only under a dispatch mode."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_alst.profiler.flops import formula


class Watch(TorchDispatchMode):
    """Dispatch mode that passes every operator to a function, with the mode off meanwhile."""

    supports_higher_order_operators = True

    def __init__(self, run: Callable[[Any, tuple, dict[str, Any]], Any]) -> None:
        super().__init__()
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if getattr(func, "namespace", "") == "prim":
            return func(*args, **(kwargs or {}))  # query of a fake tensor, such as its device
        if _is_made_of_others(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return self._run(func, args, kwargs or {})


@functools.cache
def _is_made_of_others(func: Any) -> bool:
    """Return True if an operator has no kernel and runs as its parts.

    Only autograd decomposes it, not inference mode. silu_backward has a kernel besides, which needs less memory.
    """
    if not isinstance(func, torch._ops.OpOverload) or formula(func) is not None:
        return False
    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, func.name())
    return has_kernel("CompositeImplicitAutograd") and not (has_kernel("CPU") or has_kernel("CUDA"))


@contextmanager
def resizes_seen(seen: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Report storage resizes, which are not operators, to a function."""
    resize = torch.UntypedStorage.resize_

    def resize_(self: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        result = resize(self, *args, **kwargs)
        seen(self)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        # The method is inherited; deleting the attribute restores it.
        del torch.UntypedStorage.resize_


def adds_for_autograd(func: Any, args: tuple, kwargs: dict) -> bool:
    """Return True if autograd, not the program, is adding two gradients of one tensor.

    Autograd sums into an input whose last reference it holds; under a dispatch mode it always allocates the sum (torch
    2.13, input_buffer.cpp).
    """
    if func is not torch.ops.aten.add.Tensor or kwargs or len(args) != 2:
        return False
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    first, second = args
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return first.shape == second.shape and first.dtype == second.dtype and _called_by_engine()


def _called_by_engine() -> bool:
    """Return True if autograd calls from C++: the next Python frame starts a backward, or none exists."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith((__package__, "torch._")):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is None or frame.f_code.co_name == "_engine_run_backward"

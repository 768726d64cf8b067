"""Proofs of the function that a program's module computes, on random tensors, before it is replaced.

Proofs run on CPU with tensors of their own and change nothing of the program's.
"""

from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.apart import apart

_SEED = 4_001


def proven(prove: Callable[..., Any], *args: Any) -> Any:
    """Return a proof's result; None if the program's code cannot run on the given tensors."""

    def run() -> Any:
        with torch.random.fork_rng(devices=[]):
            return prove(*args)

    try:
        return apart(run)
    except Exception:  # foreign code may raise anything; it then stays in place
        return None


def draw() -> Callable[..., torch.Tensor]:
    """Return a function that draws random CPU tensors, the same in every process, from its own generator."""
    generator = torch.Generator().manual_seed(_SEED)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def agree(found: Any, expected: torch.Tensor, roundings: int) -> bool:
    """Return True if two tensors match in dtype, shape and, within ``roundings`` eps of the largest, value."""
    if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    most = roundings * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(((found - expected).abs() <= most).all())


def is_plain(x: Any) -> bool:
    """Return True if ``x`` is a tensor with its own memory, not a traceable wrapper subclass."""
    return isinstance(x, torch.Tensor) and not torch.utils._python_dispatch.is_traceable_wrapper_subclass(x)

"""What a module or a function of a program's computes, proven on random tensors before something else takes its place.

Proofs run on CPU with tensors of their own, and nothing of the program's is changed by them.
"""

from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.apart import apart

_SEED = 4_001


def proven(prove: Callable[..., Any], *args: Any) -> Any:
    """What a proof finds; None where the program's code cannot run on the tensors that it is given."""

    def run() -> Any:
        with torch.random.fork_rng(devices=[]):
            return prove(*args)

    try:
        return apart(run)
    except Exception:  # foreign code may fail in any way; then it stays as it is
        return None


def draw() -> Callable[..., torch.Tensor]:
    """Makes random tensors on CPU, the same in every process, and leaves the program's own generators alone."""
    generator = torch.Generator().manual_seed(_SEED)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def agree(found: Any, expected: torch.Tensor, roundings: int) -> bool:
    """Whether two tensors are one within so many roundings of their largest element, and of one kind."""
    if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    most = roundings * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(((found - expected).abs() <= most).all())


def is_plain(x: Any) -> bool:
    """Whether something is a tensor with a memory of its own, and not one that others are made up of."""
    return isinstance(x, torch.Tensor) and not torch.utils._python_dispatch.is_traceable_wrapper_subclass(x)

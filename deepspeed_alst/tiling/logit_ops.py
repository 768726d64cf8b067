"""Parse the ops a model applies to its logits between head and loss as a scale and a soft cap."""

import math
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.tiling.loss import OnTheWay

Step = tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]
"""A function, its arguments before and after the logits, and its keyword arguments."""
Steps = tuple[Step, ...]

_TIMES = {"mul", "multiply", "imul", "rmul"}
_BY = {"div", "divide", "true_divide", "truediv", "itruediv"}


def on_the_way(steps: Steps) -> OnTheWay | None:
    """Return the steps as ``cap * tanh(scale * x / cap)`` or ``scale * x``; None for any other form.

    Casts to fp32 are dropped: the kernel computes in fp32.
    """
    inner, outer, has_tanh = 1.0, 1.0, False
    for function, before, after, keywords in steps:
        name = function.__name__.strip("_")
        if name == "tanh" and not (has_tanh or before or after or keywords):
            has_tanh = True
            continue
        if _casts_to_fp32(name, before, after, keywords):
            continue
        factor = _factor(name, before, after, keywords)
        if factor is None:
            return None
        inner, outer = (inner, outer * factor) if has_tanh else (inner * factor, outer)
    if not has_tanh:
        return OnTheWay(inner)
    return OnTheWay(inner * outer, outer) if 0 < outer < math.inf else None


def _casts_to_fp32(name: str, before: Any, after: Any, keywords: Any) -> bool:
    if before or name not in ("float", "to"):
        return False
    if name == "float":
        return not after and not keywords
    return (after == (torch.float32,) and not keywords) or (not after and keywords == {"dtype": torch.float32})


def _factor(name: str, before: Any, after: Any, keywords: Any) -> float | None:
    """Return the multiplier of a product or quotient with a plain number; None for any other step."""
    numbers = (*before, *after)
    if keywords or len(numbers) != 1 or type(numbers[0]) not in (int, float) or not numbers[0]:
        return None
    if name in _TIMES:
        return float(numbers[0])
    return 1.0 / numbers[0] if name in _BY and not before else None

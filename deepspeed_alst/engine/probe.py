"""The averaging probe: on the first optimizer step, is the gradient of the engine the average over all ranks?

Everything here rests on each gradient being reduced once and divided by the world size, on the path that this engine
takes through DeepSpeed (engine/reduction.py). The probe keeps some elements of the local gradient of every parameter
that trains, as autograd makes them, averages those of two parameters itself, and compares before the update. Which two
shows at the step only: half of a fresh LoRA adapter's gradients are zero. It runs at the first optimizer step that has
gradients, and leaves nothing behind.
"""

import functools
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from deepspeed_alst.errors import SetupError
from deepspeed_alst.parallel.groups import SequenceGroups

_ELEMENTS = 1024
_LARGEST = 1 << 26  # elements; DeepSpeed hands the whole gradient out in fp32, 256 MiB here
# A wrong divisor is off by a factor of at least 1 + 1/world; bf16 sums are off by some 1e-2.
_TOLERANCE = 1e-3
_LOW_PRECISION_TOLERANCE = 0.1


def install_probe(engine: Any, groups: SequenceGroups, summed_in: torch.dtype, undo: ExitStack) -> None:
    """Check the averaging factor at the engine's first optimizer step; gradients are ``summed_in`` a dtype.

    The wrapped ``engine.step`` raises SetupError on all ranks, before any weight has changed, if the factor is wrong.
    """
    watched = [_Watched(name, param) for name, param in _trained(engine.module)]
    before = engine.__dict__["step"]

    def remove() -> None:
        for each in watched:
            each.handle.remove()
        watched.clear()
        # Where the program has wrapped it meanwhile, its wrapper stays, and goes through this one.
        if engine.__dict__.get("step") is step:
            engine.__dict__["step"] = before

    @functools.wraps(before)
    def step(*args: Any, **kwargs: Any) -> Any:
        if watched and engine.is_gradient_accumulation_boundary():
            if _compare(engine, watched, groups, summed_in):
                remove()
            for each in watched:
                each.local = None
        return before(*args, **kwargs)

    engine.__dict__["step"] = step
    undo.callback(remove)


class _Watched:
    """A parameter and the sum of a slice of its local gradients."""

    def __init__(self, name: str, param: torch.nn.Parameter) -> None:
        self.name, self.param = name, param
        self.local: torch.Tensor | None = None
        self.handle = param.register_hook(self._add)

    def _add(self, grad: torch.Tensor) -> None:
        piece = _spread(grad.detach())
        self.local = piece if self.local is None else self.local + piece


def _trained(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that train and are not too large to look at, the smallest first."""

    def size(param: torch.nn.Parameter) -> int:
        return getattr(param, "ds_numel", param.numel())

    trained = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    return sorted((each for each in trained if 0 < size(each[1]) <= _LARGEST), key=lambda each: size(each[1]))


def _choose(watched: list[_Watched], groups: SequenceGroups) -> list[_Watched]:
    """The smallest and the largest that have a gradient on some rank: DeepSpeed treats those over its bucket apart."""
    alive = torch.tensor([each.local is not None and bool(each.local.any()) for each in watched], dtype=torch.int32)
    dist.all_reduce(alive, dist.ReduceOp.MAX, group=groups.control_group)
    chosen = [each for each, lives in zip(watched, alive.tolist(), strict=True) if lives]
    return [chosen[0], chosen[-1]] if chosen else []


def _spread(x: torch.Tensor) -> torch.Tensor:
    """A few thousand elements from all over a tensor: most rows of an embedding's gradient are zero."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // _ELEMENTS)].to(torch.float64)


def _compare(engine: Any, watched: list[_Watched], groups: SequenceGroups, summed_in: torch.dtype) -> bool:
    """Raise if a gradient is not the average; whether there was anything to compare."""
    compared = not watched
    for each in _choose(watched, groups):
        reduced = safe_get_full_grad(each.param)
        local = each.local
        if reduced is None:
            raise SetupError(f"the averaging probe found no gradient for {each.name} on this engine")
        reduced = _spread(reduced)
        expected = torch.zeros_like(reduced) if local is None else local.to(reduced.device)
        dist.all_reduce(expected, group=groups.world_group)
        expected /= groups.dp_size * groups.sp_size
        # fp16's loss scale is in both: DeepSpeed takes it out in the step.
        factor = _factor(expected, reduced)
        compared = compared or factor is not None
        tolerance = max(_tolerance(each.param.dtype), _tolerance(summed_in))
        if factor is not None and abs(factor - 1.0) > tolerance:
            raise SetupError(
                f"the gradient of {each.name} came out as {factor:.4g} times the average over all ranks "
                f"(ZeRO stage {engine.zero_optimization_stage()}): training would go wrong. This configuration is not "
                "one that deepspeed_alst knows; please report it."
            )
    return compared


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE if dtype in (torch.float32, torch.float64) else _LOW_PRECISION_TOLERANCE


def _factor(expected: torch.Tensor, reduced: torch.Tensor) -> float | None:
    """By what number the reduced gradient is off, as a projection; None where there is nothing to compare."""
    square = expected.dot(expected)
    if not torch.isfinite(square) or square == 0:
        return None
    return float(expected.dot(reduced) / square)

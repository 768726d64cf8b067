"""Averaging probe: check in the first optimizer step that gradients are averages over all ranks.

The package relies on each gradient being reduced once and divided by the world size, on this engine's path through
DeepSpeed (grad_reduction/zero_paths.py). The probe keeps some elements of each trainable parameter's local gradient as
autograd computes it, averages those of two parameters itself, and compares after the backward that reduces. The two are
only chosen there: half of a fresh LoRA adapter's gradients are zero. It runs in the first optimizer step with
gradients.

A program may clear or change gradients between two backwards, by ``zero_grad`` or by hand. DeepSpeed's result then
depends on the ZeRO stage, so that step is not compared, and the next one is.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import SetupError

_ELEMENTS = 1024
_LARGEST = 1 << 26  # elements; DeepSpeed returns the full gradient in fp32, 256 MiB here
# A wrong divisor gives a factor of at least 1 + 1/world; bf16 sums err by about 1e-2.
_TOLERANCE = 1e-3
_LOW_PRECISION_TOLERANCE = 0.1


class GradientCheck:
    """Check the averaging factor in an engine's first optimizer step; gradients are ``summed_in`` a dtype.

    ``backward`` raises SetupError on all ranks, before any weight has changed, if it is wrong.
    """

    def __init__(self, engine: Any, groups: SequenceGroups, summed_in: torch.dtype, patches: PatchSet) -> None:
        self._engine, self._groups, self._summed_in = engine, groups, summed_in
        self._watched = [_Watched(name, param) for name, param in _trained(engine.module)]
        self._is_touched = False
        if hasattr(engine.optimizer, "zero_grad"):  # an engine that evaluates only has none
            patches.wrap(engine.optimizer, "zero_grad", self._zero_grad)

    @property
    def is_done(self) -> bool:
        """True once it has compared."""
        return not self._watched

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Run the engine's backward inside."""
        self._is_touched |= any(each.has_been_touched() for each in self._watched)
        with ExitStack() as hooks:
            for each in self._watched:
                hooks.enter_context(each.watching())
            yield
        reduced = self._watched and self._engine.is_gradient_accumulation_boundary()
        if reduced and _compare(self._engine, self._watched, self._groups, self._summed_in, self._is_touched):
            self._watched.clear()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run the engine's step inside."""
        ends = self._engine.is_gradient_accumulation_boundary()
        yield
        if ends:
            self._is_touched = False
            for each in self._watched:
                each.forget()

    def _zero_grad(self, zero_grad: Any) -> Any:
        @functools.wraps(zero_grad)
        def call(*args: Any, **kwargs: Any) -> Any:
            self._is_touched |= any(each.local is not None for each in self._watched)
            return zero_grad(*args, **kwargs)

        return call


class _Watched:
    """Parameter with the sum of a slice of its local gradients."""

    def __init__(self, name: str, param: torch.nn.Parameter) -> None:
        self.name, self.param = name, param
        self._num_hooks = len(param._post_accumulate_grad_hooks or ())
        self.forget()

    def forget(self) -> None:
        """Reset for the next step."""
        self.local: torch.Tensor | None = None
        self._left: tuple[int, int] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the enclosed backward's gradient, after the program's own hooks, which may change it."""
        handle = self.param.register_hook(self._add) if self.param.requires_grad else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
            self._left = self._state()

    def has_been_touched(self) -> bool:
        """Return True if the gradient was cleared or changed since the last backward, or a new hook may change it."""
        added = len(self.param._post_accumulate_grad_hooks or ()) > self._num_hooks
        return added or (self.local is not None and self._left != self._state())

    def _state(self) -> tuple[int, int] | None:
        grad = self.param.grad
        return None if grad is None else (id(grad), grad._version)

    def _add(self, grad: torch.Tensor) -> None:
        piece = _spread(grad.detach())
        self.local = piece if self.local is None else self.local + piece


def _trained(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Return the trainable parameters of up to ``_LARGEST`` elements, smallest first."""

    def size(param: torch.nn.Parameter) -> int:
        return getattr(param, "ds_numel", param.numel())

    trained = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    return sorted((each for each in trained if 0 < size(each[1]) <= _LARGEST), key=lambda each: size(each[1]))


def _choose(watched: list[_Watched], groups: SequenceGroups, is_touched: bool) -> list[_Watched]:
    """Return the smallest and the largest parameter with a gradient on some rank.

    DeepSpeed handles parameters larger than its bucket separately. Empty if the program touched gradients on a rank.
    """
    alive = [each.local is not None and bool(each.local.any()) for each in watched]
    facts = torch.tensor([is_touched, *alive], dtype=torch.int32)
    dist.all_reduce(facts, dist.ReduceOp.MAX, group=groups.control_group)
    touched, *lives = facts.tolist()
    chosen = [each for each, life in zip(watched, lives, strict=True) if life and not touched]
    return [chosen[0], chosen[-1]] if chosen else []


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Sample up to 2047 elements across a tensor: most rows of an embedding's gradient are zero."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // _ELEMENTS)].to(torch.float64)


def _compare(
    engine: Any, watched: list[_Watched], groups: SequenceGroups, summed_in: torch.dtype, is_touched: bool
) -> bool:
    """Raise SetupError if a gradient is not the average; return True if any was compared."""
    compared = False
    for each in _choose(watched, groups, is_touched):
        reduced = safe_get_full_grad(each.param)
        local = each.local
        if reduced is None:
            raise SetupError(f"the averaging probe found no gradient for {each.name} on this engine")
        reduced = _spread(reduced)
        expected = torch.zeros_like(reduced) if local is None else local.to(reduced.device)
        dist.all_reduce(expected, group=groups.world_group)
        expected /= groups.dp_size * groups.sp_size
        # Both include fp16's loss scale: DeepSpeed unscales in the step.
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
    """Return the reduced gradient's factor, as a projection; None if there is nothing to compare."""
    square = expected.dot(expected)
    if not torch.isfinite(square) or square == 0:
        return None
    return float(expected.dot(reduced) / square)

"""Averaging probe: check in the first optimizer step that gradients are averages over all ranks.

It keeps some elements of each trainable parameter's local gradient, averages those of two parameters itself, and
compares after the backward that reduces. A step in which the program clears or changes gradients between two backwards
is not compared, as DeepSpeed's result then depends on the ZeRO stage; the next one is.
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
from deepspeed_alst.core.selfcheck import tolerance
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import SetupError

_ELEMENTS = 1024
_LARGEST = 1 << 26  # elements; DeepSpeed returns the full gradient in fp32, 256 MiB here


class GradientCheck:
    """Check the averaging factor in an engine's first optimizer step; gradients are ``summed_in`` a dtype.

    ``backward`` raises SetupError on all ranks, before any weight has changed, if it is wrong.
    """

    def __init__(self, engine: Any, groups: SequenceGroups, summed_in: torch.dtype, patches: PatchSet) -> None:
        self._engine, self._groups, self._summed_in = engine, groups, summed_in
        trained = ((name, param) for name, param in engine.module.named_parameters() if param.requires_grad)
        small = ((name, param) for name, param in trained if 0 < _numel(param) <= _LARGEST)
        self._watched = sorted(small, key=lambda each: _numel(each[1]))
        self._num_hooks = self._count_hooks()
        self._forget()
        if hasattr(engine.optimizer, "zero_grad"):  # an engine that evaluates only has none
            patches.wrap(engine.optimizer, "zero_grad", lambda original: functools.partial(self._zero_grad, original))

    @property
    def is_done(self) -> bool:
        """True once it has compared."""
        return not self._watched

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Run the engine's backward inside."""
        self._is_touched |= self._left != self._versions() or self._count_hooks() > self._num_hooks
        with ExitStack() as hooks:
            # After the program's own hooks, which may change the gradient.
            for name, param in self._watched:
                if param.requires_grad:
                    hooks.callback(param.register_hook(functools.partial(self._add, name)).remove)
            yield
        self._left = self._versions()
        if self._watched and self._engine.is_gradient_accumulation_boundary() and self._compare():
            self._watched.clear()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run the engine's step inside."""
        ends = self._engine.is_gradient_accumulation_boundary()
        yield
        if ends:
            self._forget()

    def _forget(self) -> None:
        """Reset for the next step."""
        self._is_touched = False
        self._local: dict[str, torch.Tensor] = {}
        """Sum of some elements of each parameter's local gradients."""
        self._left: list[tuple[int, int] | None] = []

    def _zero_grad(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._is_touched |= bool(self._local)
        return original(*args, **kwargs)

    def _count_hooks(self) -> int:
        return sum(len(param._post_accumulate_grad_hooks or ()) for _, param in self._watched)

    def _versions(self) -> list[tuple[int, int] | None]:
        """Return each gradient's identity and version, by which a change shows."""
        grads = [param.grad for name, param in self._watched if name in self._local]
        return [None if grad is None else (id(grad), grad._version) for grad in grads]

    def _add(self, name: str, grad: torch.Tensor) -> None:
        self._local[name] = self._local.get(name, 0) + _spread(grad.detach())

    def _choose(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the smallest and the largest parameter with a gradient on some rank: half of a fresh LoRA's are zero.

        DeepSpeed handles parameters larger than its bucket separately. Empty if a rank's program touched gradients.
        """
        alive = [name in self._local and bool(self._local[name].any()) for name, _ in self._watched]
        facts = torch.tensor([self._is_touched, *alive], dtype=torch.int32)
        dist.all_reduce(facts, dist.ReduceOp.MAX, group=self._groups.control_group)
        touched, *lives = facts.tolist()
        chosen = [each for each, life in zip(self._watched, lives, strict=True) if life and not touched]
        return [chosen[0], chosen[-1]] if chosen else []

    def _compare(self) -> bool:
        """Raise SetupError if a gradient is not the average; return True if any was compared."""
        compared = False
        for name, param in self._choose():
            reduced = safe_get_full_grad(param)
            if reduced is None:
                raise SetupError(f"the averaging probe found no gradient for {name} on this engine")
            reduced = _spread(reduced)
            expected = self._local[name].to(reduced.device) if name in self._local else torch.zeros_like(reduced)
            dist.all_reduce(expected, group=self._groups.world_group)
            expected /= self._groups.dp_size * self._groups.sp_size
            square = expected.dot(expected)
            if not torch.isfinite(square) or square == 0:
                continue
            # The factor as a projection. Both include fp16's loss scale: DeepSpeed unscales in the step.
            factor, compared = float(expected.dot(reduced) / square), True
            # A wrong divisor gives a factor of at least 1 + 1/world; bf16 sums err by about 1e-2.
            if abs(factor - 1.0) > max(tolerance(param.dtype), tolerance(self._summed_in)):
                raise SetupError(
                    f"the gradient of {name} came out as {factor:.4g} times the average over all ranks (ZeRO stage "
                    f"{self._engine.zero_optimization_stage()}): training would go wrong. This configuration is not "
                    "one that deepspeed_alst knows; please report it."
                )
        return compared


def _numel(param: torch.nn.Parameter) -> int:
    return getattr(param, "ds_numel", param.numel())


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Sample up to 2047 elements across a tensor: most rows of an embedding's gradient are zero."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // _ELEMENTS)].to(torch.float64)

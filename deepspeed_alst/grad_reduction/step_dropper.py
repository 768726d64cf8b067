"""Drop a whole optimizer step, as DeepSpeed does if gradients overflow.

DeepSpeed's optimizers check the gradients before they change a weight. If these are NaN or Inf, they clear the
accumulated gradients, and the engine counts a skipped step. This module wraps each optimizer's check, so that a step
can be dropped for another reason too, and finds the parameter while its gradient exists. It adds no computation except
on ZeRO 0 in fp32, where DeepSpeed has no check: there each step reads the gradients once.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.utils import safe_get_full_grad

from deepspeed_alst.core.patching import PatchSet


class StepDropper:
    """Decision for each optimizer step of one engine: take it or drop it."""

    def __init__(self, engine: Any, patches: PatchSet) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self._wanted = False
        self._norm: Any = 0.0
        self.parameter: str | None = None
        """First parameter with a NaN or Inf gradient in the last step."""
        self._looks_itself = False
        optimizer = self._optimizer
        if hasattr(optimizer, "overflow_checker"):  # ZeRO 0 in bf16
            patches.wrap(optimizer.overflow_checker, "has_overflow", self._deciding)
        elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer
            patches.wrap(optimizer, "get_grads_for_norm", self._with_invalid_norm)
        elif hasattr(optimizer, "_update_scale"):
            patches.wrap(optimizer, "_update_scale", self._before_scale_update)
            if hasattr(optimizer, "scaled_global_norm"):  # bf16 ignores it if check_grad_overflow is false
                patches.wrap(optimizer, "scaled_global_norm", self._noting_norm)
        else:  # torch optimizer, on ZeRO 0 in fp32
            self._looks_itself = True

    @contextlib.contextmanager
    def dropping(self, wanted: bool) -> Iterator[None]:
        """Drop the enclosed step if ``wanted``, equal on all ranks, or if its gradients are NaN or Inf."""
        self._wanted, self._norm, self.parameter = wanted, 0.0, None
        with PatchSet() as patches:
            if self._looks_itself and self._is_dropped(self._largest_gradient()):
                patches.wrap(self._optimizer, "step", lambda _: lambda *args, **kwargs: None)
                patches.set(self._optimizer, "overflow", True)
            yield

    def _is_dropped(self, norm: Any) -> bool:
        invalid = is_invalid_grad_norm(norm)
        if invalid and not self._wanted:
            self.parameter = self._find()
        return invalid or self._wanted

    def _find(self) -> str | None:
        """Return the first parameter with a NaN or Inf gradient. Collective: all ranks have the same norm."""
        for name, param in self._engine.module.named_parameters():
            grad = safe_get_full_grad(param) if param.requires_grad else None
            if grad is not None and not torch.isfinite(grad).all():
                return name
        return None

    def _largest_gradient(self) -> torch.Tensor:
        grads = [param.grad for param in self._engine.module.parameters() if param.grad is not None]
        return torch.nn.utils.get_total_norm(grads, norm_type=float("inf"))

    def _deciding(self, has_overflow: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(has_overflow)
        def decide(*args: Any, **kwargs: Any) -> bool:
            return self._is_dropped(float("inf") if has_overflow(*args, **kwargs) else 0.0)

        return decide

    def _with_invalid_norm(self, grads_for_norm: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``get_grads_for_norm`` of grad_reduction/partitions.py, which returns the norm in place of gradients."""

        @functools.wraps(grads_for_norm)
        def invalid_norm(for_clipping: bool = False) -> Any:
            found = grads_for_norm(for_clipping)
            if for_clipping:
                return found
            (norm,), experts = found
            return [torch.full_like(norm, float("inf")) if self._is_dropped(norm) else norm], experts

        return invalid_norm

    def _noting_norm(self, global_norm: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(global_norm)
        def note(*args: Any, **kwargs: Any) -> Any:
            self._norm = global_norm(*args, **kwargs)
            return self._norm

        return note

    def _before_scale_update(self, update_scale: Callable[..., None]) -> Callable[..., None]:
        """Wrap ``_update_scale``, after which ZeRO 1 to 3 read ``overflow``."""

        @functools.wraps(update_scale)
        def decide(has_overflow: bool = False) -> None:
            self._optimizer.overflow = self._is_dropped(float("inf") if has_overflow else self._norm)
            update_scale(self._optimizer.overflow)

        return decide

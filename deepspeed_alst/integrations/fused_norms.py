"""RMSNorm modules of a model that run kernels/rms_norm.py instead of their own forward.

Modules are not matched by name: a module is replaced if its own forward, on random rows, gives the result of one form
of the op, bitwise equal in half precision except for rounding, and the same gradients. All others stay unchanged, as do
modules with hooks, an instance forward or a parametrization.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import allclose_ulp, is_equivalent, is_plain, random_tensors, result_or_none
from deepspeed_alst.kernels.rms_norm import DTYPES, rms_norm
from deepspeed_alst.kernels.rms_norm_ops import rms_norm_reference

_HIGHEST_EPS = 1e-2
_SIZE_WITHOUT_WEIGHT = 96
# Scales of the rows: eps matters in some, one is zero, in one the squares exceed fp16's range.
_ROW_SIZES = (0.0, 1e-4, 1e-3, 1e-2, 1.0, 1.0, 1.0, 300.0)
# Fraction of a half-precision result's elements; one rounding more or less changes a third of them.
_MOST_UNEQUAL = 0.01


@dataclass(frozen=True)
class _Form:
    """Form of the op, with the name of the module's weight or None."""

    weight: str | None
    eps: float
    offset: float
    cast_first: bool


def fuse_norms(model: torch.nn.Module, patches: PatchSet) -> dict[str, int]:
    """Make a model's RMSNorm modules run the op; return the count per class. ``patches.close()`` undoes it.

    Under ZeRO-3 a partitioned weight is gathered when the module runs, and again in its backward.
    """
    fused: dict[str, int] = {}
    for module in model.modules():
        form = _form_of(module)
        if form is None:
            continue
        # A method, so that a copy of the module uses its own weight.
        patches.forward(module, _by_op(type(module).forward, form))
        name = type(module).__name__
        fused[name] = fused.get(name, 0) + 1
    return fused


def _by_op(forward: Callable[..., Any], form: _Form) -> Callable[..., Any]:
    """Return a forward that runs the op where the proof holds, else the original forward."""

    @functools.wraps(forward)
    def by_op(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # torch.compile fuses the module's own ops and chooses what to save.
        if torch.compiler.is_compiling() or kwargs or len(args) != 1 or not is_plain(args[0]):
            return forward(self, *args, **kwargs)
        (x,), weight_H = args, None if form.weight is None else getattr(self, form.weight)
        if x.dtype not in DTYPES or x.dim() == 0 or not (weight_H is None or _fits(weight_H, x)):
            return forward(self, x)
        return rms_norm(x, weight_H, form.eps, form.offset, form.cast_first)

    return by_op


def _fits(weight_H: torch.Tensor, x: torch.Tensor) -> bool:
    return weight_H.shape == x.shape[-1:] and weight_H.dtype == x.dtype and weight_H.device == x.device


def _form_of(module: torch.nn.Module) -> _Form | None:
    """Return the form of the op that a module computes; None without one, or if the module has hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    epsilons = [each for each in vars(module).values() if type(each) is float and 0 < each < _HIGHEST_EPS]
    weights = {name: each for name, each in module._parameters.items() if each is not None}
    if not epsilons or module._modules or module._buffers or any(hooks) or "forward" in vars(module):
        return None
    if len(weights) > 1 or not all(is_plain(each) for each in weights.values()):
        return None
    weight, parameter = next(iter(weights.items()), (None, None))
    shape = (_SIZE_WITHOUT_WEIGHT,) if parameter is None else getattr(parameter, "ds_shape", parameter.shape)
    if len(shape) != 1:
        return None
    for eps in epsilons:
        for offset in (0.0, 1.0) if weight else (0.0,):
            for cast_first in (True, False) if weight else (False,):
                form = _Form(weight, eps, offset, cast_first)
                if result_or_none(_computes, module, form, shape[0]):
                    return form
    return None


def _computes(module: torch.nn.Module, form: _Form, H: int) -> bool:
    """Return True if a module's forward matches a form in all dtypes, and its gradients in fp32."""
    return all(_computes_in(module, form, H, dtype) for dtype in DTYPES)


def _computes_in(module: torch.nn.Module, form: _Form, H: int, dtype: torch.dtype) -> bool:
    def forward(x_TH: torch.Tensor, weight_H: torch.Tensor | None) -> torch.Tensor:
        # A copy with a random weight: the module's may be all ones or zeros, which prove nothing, or not on CPU.
        twin = copy.copy(module)
        if form.weight is not None:
            vars(twin)["_parameters"] = {form.weight: weight_H}
        twin.training = True
        return type(module).forward(twin, x_TH)

    def reference(x_TH: torch.Tensor, weight_H: torch.Tensor | None) -> torch.Tensor:
        return rms_norm_reference(x_TH, weight_H, form.eps, form.offset, form.cast_first)

    draw = random_tensors()
    x_TH = (draw(len(_ROW_SIZES), H) * torch.tensor(_ROW_SIZES)[:, None]).to(dtype)
    weight_H = None if form.weight is None else draw(H).to(dtype)
    if dtype == torch.float32:
        leaves = tuple(each if each is None else each.requires_grad_() for each in (x_TH, weight_H))
        return is_equivalent(forward, reference, leaves, 8, 64)
    found_TH, expected_TH = forward(x_TH, weight_H), reference(x_TH, weight_H)
    unequal = (found_TH != expected_TH).double().mean().item()
    return allclose_ulp(found_TH, expected_TH, 2) and unequal <= _MOST_UNEQUAL

"""RMSNorm modules of a model that run kernels/rms_norm.py instead of their own forward.

No module is known by its name: one takes part if its own forward, on random rows, gives what one form of the op gives,
to the last bit in half precision but for rounding, and the same gradients. Everything else stays as it is, and so does
a module that something hangs on: hooks, a forward of its own, a parametrization.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.kernels.rms_norm import DTYPES, rms_norm
from deepspeed_alst.kernels.rms_norm_ops import rms_norm_backward_reference, rms_norm_reference
from deepspeed_alst.models.proofs import agree, draw, is_plain, proven

_HIGHEST_EPS = 1e-2
_SIZE_WITHOUT_WEIGHT = 96
# Of the rows' sizes: in some of them eps counts, one is zero, in one the squares pass fp16's range.
_ROW_SIZES = (0.0, 1e-4, 1e-3, 1e-2, 1.0, 1.0, 1.0, 300.0)
# Of a half-precision result's elements; a rounding more or less would show in a third of them.
_MOST_UNEQUAL = 0.01


@dataclass(frozen=True)
class _Form:
    """A form of the op, and the name of the module's weight; None if it has none."""

    weight: str | None
    eps: float
    offset: float
    cast_first: bool


def fuse_norms(model: torch.nn.Module, patches: PatchSet) -> dict[str, int]:
    """Have a model's RMSNorm modules run the op; returns how many of each class do. ``patches.close()`` takes it back.

    A weight that ZeRO-3 partitions is there when the module runs, and again when its backward does.
    """
    fused: dict[str, int] = {}
    for module in model.modules():
        form = _form_of(module)
        if form is None:
            continue
        # A method, so that a copy of the module runs it on its own weight.
        patches.forward(module, _by_op(type(module).forward, form))
        name = type(module).__name__
        fused[name] = fused.get(name, 0) + 1
    return fused


def _by_op(forward: Callable[..., Any], form: _Form) -> Callable[..., Any]:
    """A forward that runs the op wherever the proof holds, and else what it was."""

    @functools.wraps(forward)
    def by_op(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A compiler makes one kernel of the module's own steps, and knows what to keep.
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
    """The form of the op that a module computes; None if it is none, or if something hangs on it."""
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
                if proven(_computes, module, form, shape[0]):
                    return form
    return None


def _computes(module: torch.nn.Module, form: _Form, H: int) -> bool:
    """Whether a module's own forward gives what a form gives, in all dtypes, and its gradients."""
    return all(found for dtype in DTYPES for found in _verdicts(module, form, H, dtype))


def _verdicts(module: torch.nn.Module, form: _Form, H: int, dtype: torch.dtype) -> Iterator[bool]:
    make = draw()
    x_TH = (make(len(_ROW_SIZES), H) * torch.tensor(_ROW_SIZES)[:, None]).to(dtype).requires_grad_()
    # A copy with a weight of its own: the module's may be all ones or zeros, which prove nothing, or elsewhere.
    twin, weight_H = copy.copy(module), None
    if form.weight is not None:
        weight_H = torch.nn.Parameter(make(H).to(dtype))
        vars(twin)["_parameters"] = {form.weight: weight_H}
    twin.training = True
    found_TH = type(module).forward(twin, x_TH)
    expected_TH = rms_norm_reference(x_TH.detach(), weight_H, form.eps, form.offset, form.cast_first).detach()
    if dtype != torch.float32:
        yield agree(found_TH, expected_TH, 2)
        yield (found_TH != expected_TH).double().mean().item() <= _MOST_UNEQUAL
        return
    yield agree(found_TH, expected_TH, 8)
    dy_TH = make(len(_ROW_SIZES), H)
    leaves = [x_TH] if weight_H is None else [x_TH, weight_H]
    grads = torch.autograd.grad(found_TH, leaves, dy_TH)
    expected = rms_norm_backward_reference(dy_TH, x_TH, weight_H, form.eps, form.offset)
    yield from (agree(*pair, 64) for pair in zip(grads, expected, strict=False))

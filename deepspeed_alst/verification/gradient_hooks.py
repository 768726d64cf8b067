"""User hooks on parameter gradients: each rank's gradient is its shard's, so the hooks must be linear."""

import math
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.verification.program_code import is_programs

_LARGEST = 2**30  # elements
_CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
_CLOSE_IN_HALF = 2e-2


def check_gradient_hooks(model: torch.nn.Module) -> None:
    """Raise if a user hook on a parameter's gradient does more than mask or scale.

    The gradients of a sequence's ranks are summed after the hook; only for a linear hook the sum equals the hook's
    result on the full sequence's gradient.

    Raises:
        UnsupportedModelError: a hook is not linear; with the parameter's name.
    """
    for name, param in model.named_parameters():
        for hook in list((param._backward_hooks or {}).values()):
            if is_programs(hook) and not _is_linear(hook, param):
                raise UnsupportedModelError(
                    f"{name} has a hook of the program's on its gradient that is not linear (it clips, or scales by "
                    "what it finds there): under sequence parallelism it would be given the gradient of a shard. Mask "
                    "or scale by a constant, use gradient_clipping, or set sequence_parallel_size to 1"
                )


def _is_linear(hook: Callable[..., Any], param: torch.nn.Parameter) -> bool:
    shape = getattr(param, "ds_shape", param.shape)
    if math.prod(shape) > _LARGEST:
        return False
    make = torch.Generator().manual_seed(0)
    # Integers, whose sum is exact in any dtype; some are large, to trigger clipping.
    one, other = (
        torch.randint(-64, 65, shape, generator=make).to(param.device, param.dtype, copy=True) for _ in range(2)
    )
    with torch.no_grad(), torch.random.fork_rng([]):
        try:
            first, second, both = (_hooked(hook, each) for each in (one, other, one + other))
        except Exception:  # the hook runs only on the gradients of a step
            return False
    close = _CLOSE.get(param.dtype, _CLOSE_IN_HALF)
    return bool(((first + second - both).abs() <= close * both.abs().max()).all())


def _hooked(hook: Callable[..., Any], grad: torch.Tensor) -> torch.Tensor:
    grad = grad.clone()
    changed = hook(grad)
    return grad if changed is None else changed

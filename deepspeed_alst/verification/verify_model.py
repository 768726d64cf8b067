"""Verify a model before its attention is patched: by the census's list, a tiny model, and its own modules and hooks.

A module of a user-defined class that was put into a built model is in no list and in no tiny model, so it must be
token-wise: its output for a slice of the tokens is that slice of its output for all. Gradients of a sequence's ranks
are summed behind hooks on parameters, so these must be linear.

Legend: S tokens, H input features of a module.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.verification.program_code import is_programs, program_code
from deepspeed_alst.verification.verified_models import RIGHT

_TOKENS = 7
_PARTS = (slice(0, 3), slice(3, None))
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
_CLOSE_IN_HALF = 5e-2
_HOOK_CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
_HOOK_CLOSE_IN_HALF = 2e-2
_LARGEST = 2**30  # elements of a gradient


def verify_model(spec: ModelSpec, groups: SequenceGroups, upstream: bool = False) -> str:
    """Raise unless the census found the model's family right, or a tiny model of its kind is right here.

    Collective over the groups' gloo groups. In an ``upstream`` program, written for DeepSpeed's own ALST, the code that
    it has put into the model is not tried: this package replaces it.

    Returns:
        Summary of the trial; empty for a listed family.

    Raises:
        UnsupportedModelError: the model is not right; on all ranks.
    """
    check_gradient_hooks(spec.outer)
    base = spec.model
    # Modules that were put in are tried by themselves: a tiny model would not have them.
    put_in = {f"{cls.__module__}.{cls.__qualname__}" for cls in map(type, _custom_modules(base).values())}
    code = () if upstream else tuple(each for each in program_code(spec.outer) if each not in put_in)
    if base.config.model_type in RIGHT and not code:
        check_custom_modules(base, None)
        return ""
    from deepspeed_alst.verification.hf_parity_trial import check_tiny_model

    unlisted = (
        f"{type(base).__name__} (model_type='{base.config.model_type}') is none of the {len(RIGHT)} families that are "
        "verified under sequence parallelism (docs/census.md)"
    )
    if base.config.model_type in RIGHT:
        unlisted = f"{type(base).__name__} runs code of the program's own ({', '.join(code[:4])})"
    return check_tiny_model(spec, groups, unlisted, code)


# --- modules of the program's own


def _custom_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the outermost modules of user-defined classes, by name; the model itself is excluded."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if name and is_programs(type(module)) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def check_custom_modules(model: torch.nn.Module, built: torch.nn.Module | None) -> None:
    """Raise UnsupportedModelError if a user-defined module that no tiny model has ``built`` is not token-wise."""
    tried = {type(module) for module in built.modules()} if built is not None else set()
    for name, module in _custom_modules(model).items():
        if type(module) not in tried and (problem := run_isolated(_problem, module)):
            cls = f"{type(module).__module__}.{type(module).__qualname__}"
            raise UnsupportedModelError(
                f"{name} is a {cls}, which no trial has seen, and {problem}: under sequence parallelism it would see "
                "a part of the sequence. Build it in the model's class, so that a small model of the class can be "
                "tried, or set sequence_parallel_size to 1."
            )


def _problem(module: torch.nn.Module) -> str:
    """Return why a module is not known to be token-wise; empty if it is."""
    import deepspeed

    training = module.training
    with torch.random.fork_rng([]), deepspeed.zero.GatheredParameters(list(module.parameters())):
        weight = next((param for param in module.parameters() if param.dim()), None)
        width = next((each.in_features for each in module.modules() if isinstance(each, torch.nn.Linear)), None)
        if width is None:  # a norm's weight has its input's width; without weights any width works
            width = _TOKENS if weight is None else weight.shape[-1]
        x_SH, dx_SH = torch.randn(2, 1, _TOKENS, width, generator=torch.Generator().manual_seed(0))
        x_SH = x_SH if weight is None else x_SH.to(weight.device, weight.dtype)
        module.eval()
        try:
            # Tokens before and after a part must not change its result.
            whole = _output_and_gradient(module, x_SH, dx_SH)
            parts = [_output_and_gradient(module, x_SH[:, rows], dx_SH[:, rows]) for rows in _PARTS]
        except Exception as error:
            return f"cannot be tried by itself ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
        finally:
            module.train(training)
    for all_rows, *of_parts in zip(whole, *parts, strict=True):
        if all_rows.shape[:2] != x_SH.shape[:2]:
            return f"gives {list(all_rows.shape)} for {list(x_SH.shape)}"
        off = (torch.cat(of_parts, dim=1) - all_rows).double().norm() / all_rows.double().norm().clamp(min=1e-30)
        if not off <= _CLOSE.get(all_rows.dtype, _CLOSE_IN_HALF):
            return "mixes tokens"
    return ""


def _output_and_gradient(
    module: torch.nn.Module, x: torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a module's output for some tokens and their gradient; the weights get none."""
    x = x.detach().requires_grad_()
    output = module(x)
    output = output[0] if isinstance(output, tuple) else output
    if not output.requires_grad:
        return output, torch.zeros_like(x)
    given = like[..., :1].to(output.device, output.dtype).expand_as(output)
    return output.detach(), torch.autograd.grad(output, x, given, allow_unused=True, materialize_grads=True)[0]


# --- hooks of the program's own on gradients


def check_gradient_hooks(model: torch.nn.Module) -> None:
    """Raise UnsupportedModelError if a user hook on a parameter's gradient does more than mask or scale."""
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
    close = _HOOK_CLOSE.get(param.dtype, _HOOK_CLOSE_IN_HALF)
    return bool(((first + second - both).abs() <= close * both.abs().max()).all())


def _hooked(hook: Callable[..., Any], grad: torch.Tensor) -> torch.Tensor:
    grad = grad.clone()
    changed = hook(grad)
    return grad if changed is None else changed

"""User-defined modules in a model: layers inserted by user code or subclassed.

The list of verified families covers transformers' own code only. A tiny model of a user-defined class is probed
(probe.py). No probe covers a module inserted into a built model, so it must be token-wise: its output for a slice of
the tokens is that slice of its output for all.

Legend: S tokens, H input features of a module.
"""

import contextlib
from collections.abc import Iterator

import torch

from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.verification.program_code import is_custom_class

_TOKENS = 7
_PARTS = (slice(0, 3), slice(3, None))
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
_CLOSE_IN_HALF = 5e-2


def custom_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the outermost modules of user-defined classes, by name; the model itself is excluded."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if name and is_custom_class(type(module)) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def check_custom_modules(model: torch.nn.Module, built: torch.nn.Module | None) -> None:
    """Raise if a user-defined module that the model's class does not build is not token-wise.

    Args:
        model: the user's model.
        built: a probed model of the same class; None if there was no probe.

    Raises:
        UnsupportedModelError: with the module's name.
    """
    tried = {type(module) for module in built.modules()} if built is not None else set()
    for name, module in custom_modules(model).items():
        if type(module) in tried:
            continue
        problem = run_isolated(_problem, module)
        if problem:
            cls = f"{type(module).__module__}.{type(module).__qualname__}"
            raise UnsupportedModelError(
                f"{name} is a {cls}, which no trial has seen, and {problem}: under sequence parallelism it would see "
                "a part of the sequence. Build it in the model's class, so that a small model of the class can be "
                "tried, or set sequence_parallel_size to 1."
            )


def _problem(module: torch.nn.Module) -> str:
    """Return why a module is not known to be token-wise; empty if it is."""
    first = next((param for param in module.parameters() if _shape(param)), None)
    width = next((each.in_features for each in module.modules() if isinstance(each, torch.nn.Linear)), None)
    if width is None:  # a norm's weight has its input's width; without weights any width works
        width = _TOKENS if first is None else _shape(first)[-1]
    x_SH, dx_SH = torch.randn(2, 1, _TOKENS, width, generator=torch.Generator().manual_seed(0))
    x_SH = x_SH if first is None else x_SH.to(first.device, first.dtype)
    training = module.training
    with torch.random.fork_rng([]), _whole(module):
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
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"it gives a {type(output).__name__}")
    if not output.requires_grad:
        return output.detach(), torch.zeros_like(x)
    given = like[..., :1].to(output.device, output.dtype).expand_as(output)
    return output.detach(), torch.autograd.grad(output, x, given, allow_unused=True, materialize_grads=True)[0]


def _shape(param: torch.nn.Parameter) -> torch.Size:
    return getattr(param, "ds_shape", param.shape)


@contextlib.contextmanager
def _whole(module: torch.nn.Module) -> Iterator[None]:
    """Gather the module's weights in the context if ZeRO-3 has partitioned them."""
    sharded = [param for param in module.parameters() if hasattr(param, "ds_id")]
    if not sharded:
        yield
        return
    sharded[0].all_gather(sharded)
    try:
        yield
    finally:
        sharded[0].partition(sharded)

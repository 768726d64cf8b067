"""Program code in a live model: classes, methods, functions and hooks that no installed library defines.

The list of verified families holds for transformers' own code. All other code is checked by the live model's forward
(model_check.py), and in a tiny model of its kind, with the backward (hf_parity_trial.py).
"""

import contextlib
import functools
import inspect
import math
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import huggingface_hub
import torch

from deepspeed_alst.core.selfcheck import agrees
from deepspeed_alst.errors import UnsupportedModelError

GRADIENT_HOOK = "gradient hook of"
# Functions that torch.compile puts beside those that it has compiled.
_COMPILED = ("__compiled_fn_", "__resume_at_")
_PACKAGES = ("/site-packages/", "/dist-packages/")
_MAX_GRAD_ELEMENTS = 2**30  # elements of a gradient
_HOOKS = {
    "_forward_pre_hooks": "forward_pre",
    "_forward_hooks": "forward",
    "_backward_pre_hooks": "full_backward_pre",
    "_backward_hooks": "full_backward",
}


@functools.cache
def _library_roots() -> tuple[str, ...]:
    """Return the folders of installed code, and those of libraries installed in place."""
    roots = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib")}
    roots.add(huggingface_hub.constants.HF_HUB_CACHE)  # kernels of the hub
    for name in ("torch", "transformers", "deepspeed", "accelerate", "peft", "trl", "liger_kernel", "deepspeed_alst"):
        if file := getattr(sys.modules.get(name), "__file__", None):
            roots.add(str(Path(file).parent))
    return tuple(f"{root}/" for root in roots)


def _is_library_module(name: str) -> bool:
    """Return True if a name in ``sys.modules`` is installed code; a script or a notebook is not."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return isinstance(module, ModuleType) and name != "__main__"
    return any(folder in str(file) for folder in _PACKAGES) or str(file).startswith(_library_roots())


def is_user_defined(value: Any) -> bool:
    """Return True for a class of the program's own, or a callable with such a function in it or around it."""
    if isinstance(value, type):
        return not _is_library_module(value.__module__)
    # Copies of functions have globals without a __name__ (core/patching.py).
    homes = (each.__globals__.get("__name__") or each.__module__ or "" for each in _functions(value, set()))
    return any(not _is_library_module(home) for home in homes)


def _functions(value: Any, seen: set[int]) -> Iterator[FunctionType]:
    """Yield the functions in a callable, its decorators and closures, the outermost first."""
    if id(value) in seen or len(seen) > 100:
        return
    seen.add(id(value))
    inside: list[Any] = []
    if isinstance(value, FunctionType):
        yield value
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                inside.append(cell.cell_contents)
        inside.append(getattr(value, "__wrapped__", None))
    elif isinstance(value, MethodType | classmethod | staticmethod):
        inside = [value.__func__]
    elif isinstance(value, functools.partial):
        inside = [value.func]
    elif isinstance(value, property):
        inside = [value.fget]
    elif not isinstance(value, type | torch.nn.Module):
        call = inspect.getattr_static(type(value), "__call__", None)
        inside = [call] if isinstance(call, FunctionType) else []
    for each in inside:
        yield from _functions(each, seen)


def program_code(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the program's own code that runs in a model; empty if there is none.

    Covered are the modules' classes, the source modules that define these, methods and hooks of single modules, and
    hooks on gradients of parameters. A class of the program's own counts as one.
    """
    classes = dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__ if cls is not object)
    found = [class_name(cls) for cls in classes if is_user_defined(cls)]
    libraries = [cls for cls in classes if not is_user_defined(cls)]
    for cls in libraries:
        members = [(name, value) for name, value in list(vars(cls).items()) if not isinstance(value, type)]
        found += [f"{cls.__qualname__}.{name}" for name, value in members if is_user_defined(value)]
    for home in dict.fromkeys(cls.__module__ for cls in libraries):
        functions = [each for each in vars(sys.modules[home]).items() if isinstance(each[1], FunctionType)]
        functions = [each for each in functions if not each[0].startswith(_COMPILED)]
        found += [f"{home}.{name}" for name, value in functions if is_user_defined(value)]
    found += [f"{kind} of {name or type(model).__name__}" for name, kind, *_ in code_of_modules(model)]
    return (*found, *(f"{GRADIENT_HOOK} {name}" for name, *_ in _gradient_hooks(model)))


def class_name(cls: type) -> str:
    """Return a class's module and name."""
    return f"{cls.__module__}.{cls.__qualname__}"


def code_of_modules(model: torch.nn.Module) -> Iterator[tuple[str, str, Any, dict[str, Any] | None]]:
    """Yield program code on single modules: the module's name, a method's name or a hook's kind, code, hook options."""
    for name, module in model.named_modules():
        methods = {key: value for key, value in vars(module).items() if hasattr(type(module), key) and callable(value)}
        for attribute, value in methods.items():
            if not isinstance(value, torch.nn.Module | type) and is_user_defined(value) and not _is_wrapper(value):
                yield name, attribute, value, None
        for attribute, kind in _HOOKS.items():
            with_kwargs = vars(module).get(f"{attribute}_with_kwargs", ())
            for key, hook in list(vars(module)[attribute].items()):
                if is_user_defined(hook) and not _is_wrapper(hook):
                    yield name, kind, hook, {"with_kwargs": True} if key in with_kwargs else {}


def _gradient_hooks(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, Any]]:
    """Yield the program's hooks on gradients: the parameter's name, the parameter, the hook."""
    for name, param in model.named_parameters():
        yield from (
            (name, param, hook) for hook in list((param._backward_hooks or {}).values()) if is_user_defined(hook)
        )


def _is_wrapper(value: Any) -> bool:
    """Return True if a callable is this package's or DeepSpeed's wrapper around the original."""
    names = (each.__globals__.get("__name__", "") for each in _functions(value, set()))
    return next((name for name in names if not name.startswith("torch.")), "").startswith("deepspeed")


def check_gradient_hooks(model: torch.nn.Module) -> None:
    """Raise UnsupportedModelError if a user hook on a parameter's gradient does more than mask or scale."""
    for name, param, hook in _gradient_hooks(model):
        if not _is_linear(hook, param):
            raise UnsupportedModelError(
                f"{name} has a gradient hook that is not linear (it clips, or scales by a value of the gradient): "
                "under sequence parallelism it would get the gradient of a shard. Mask or scale by a constant, use "
                "gradient_clipping, or set sequence_parallel_size to 1"
            )


def _is_linear(hook: Callable[..., Any], param: torch.nn.Parameter) -> bool:
    def hooked(grad: torch.Tensor) -> torch.Tensor:
        changed = hook(given := grad.clone())
        return given if changed is None else changed

    shape, make = getattr(param, "ds_shape", param.shape), torch.Generator().manual_seed(0)
    if math.prod(shape) > _MAX_GRAD_ELEMENTS:
        return False
    # Integers, whose sum is exact in any dtype; some are large, to trigger clipping.
    one, other = (torch.randint(-64, 65, shape, generator=make).to(param.device, param.dtype) for _ in range(2))
    with torch.no_grad(), torch.random.fork_rng([]):
        try:
            return agrees(hooked(one) + hooked(other), hooked(one + other))
        except Exception:  # the hook runs only on the gradients of a step
            return False

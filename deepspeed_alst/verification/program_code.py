"""Program code in a live model: methods, functions and hooks that no installed library defines.

The list of verified families holds for transformers' own code. All other code is checked by the live model's forward,
unsharded and sharded (model_check.py), and in a tiny model of its kind, where it is installed here, with the backward.
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

from deepspeed_alst.core.function_copies import with_objects
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import is_equivalent, random_tensors, run_isolated
from deepspeed_alst.errors import UnsupportedModelError

# Functions that torch.compile puts beside those that it has compiled.
_COMPILED = ("__compiled_fn_", "__resume_at_")
_PACKAGES = ("/site-packages/", "/dist-packages/")
_HOOKS = {
    "_forward_pre_hooks": "forward_pre",
    "_forward_hooks": "forward",
    "_backward_pre_hooks": "full_backward_pre",
    "_backward_hooks": "full_backward",
}

_TOKENS = 7
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
_CLOSE_IN_HALF = 5e-2
_HOOK_CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}
_HOOK_CLOSE_IN_HALF = 2e-2
_LARGEST = 2**30  # elements of a gradient


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


def is_programs(value: Any) -> bool:
    """Return True for a class of the program's own, or a callable with such a function in it or around it."""
    if isinstance(value, type):
        return not _is_library_module(value.__module__)
    # Copies of functions have globals without a __name__ (function_copies.py).
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

    Covered are the modules' classes, the source modules that define these, and methods and hooks of single modules. A
    class of the program's own counts as one.
    """
    classes = dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__ if cls is not object)
    found = [f"{cls.__module__}.{cls.__qualname__}" for cls in classes if is_programs(cls)]
    libraries = [cls for cls in classes if not is_programs(cls)]
    for cls in libraries:
        members = [(name, value) for name, value in list(vars(cls).items()) if not isinstance(value, type)]
        found += [f"{cls.__qualname__}.{name}" for name, value in members if is_programs(value)]
    for home in dict.fromkeys(cls.__module__ for cls in libraries):
        functions = [each for each in vars(sys.modules[home]).items() if isinstance(each[1], FunctionType)]
        functions = [each for each in functions if not each[0].startswith(_COMPILED)]
        found += [f"{home}.{name}" for name, value in functions if is_programs(value)]
    found += [f"{kind} of {name or type(model).__name__}" for name, kind, *_ in _installed(model)]
    return tuple(found)


def _installed(model: torch.nn.Module) -> Iterator[tuple[str, str, Any, dict[str, Any] | None]]:
    """Yield program code on single modules: the module's name, a method's name or a hook's kind, code, hook options."""
    for name, module in model.named_modules():
        methods = {key: value for key, value in vars(module).items() if hasattr(type(module), key) and callable(value)}
        for attribute, value in methods.items():
            if not isinstance(value, torch.nn.Module | type) and is_programs(value) and not _is_wrapper(value):
                yield name, attribute, value, None
        for attribute, kind in _HOOKS.items():
            with_kwargs = vars(module).get(f"{attribute}_with_kwargs", ())
            for key, hook in list(vars(module)[attribute].items()):
                if is_programs(hook) and not _is_wrapper(hook):
                    yield name, kind, hook, {"with_kwargs": True} if key in with_kwargs else {}


def _is_wrapper(value: Any) -> bool:
    """Return True if a callable is this package's or DeepSpeed's wrapper around the original."""
    names = (each.__globals__.get("__name__", "") for each in _functions(value, set()))
    return next((name for name in names if not name.startswith("torch.")), "").startswith("deepspeed")


def install_program_code(spec: ModelSpec, small: torch.nn.Module) -> torch.nn.Module:
    """Install the program code of single modules on a tiny model of the same kind; return the tiny model.

    Objects of the live model that the code reaches, by a closure or a bound method, become those of the tiny model.

    Raises:
        LookupError: the tiny model has no module of that name.
    """
    model, base = spec.outer, spec.model
    counterparts = {id(model): small}
    for name, module in base.named_modules():
        if (other := _counterpart(small, name)) is not None:
            counterparts[id(module)] = other
    of_wrapper = [each for each in _installed(model) if each[0] == ""] if base is not model else []
    for name, kind, code, hook_options in [*_installed(base), *of_wrapper]:
        other = _counterpart(small, name)
        if other is None:
            raise LookupError(f"{kind} of {name}: a small model of the kind has no such module")
        code = with_objects(code, lambda value: counterparts.get(id(value), value))
        if hook_options is None:
            PatchSet().set(other, kind, code)
        else:
            PatchSet().hook(other, kind, code, **hook_options)
    return small


def _counterpart(small: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """Return the module of the same name or None; indices wrap around in shorter ModuleLists."""
    module = small
    for part in name.split(".") if name else ():
        if isinstance(module, torch.nn.ModuleList) and part.isdigit() and len(module):
            module = module[int(part) % len(module)]
        elif isinstance(found := getattr(module, part, None), torch.nn.Module):
            module = found
        else:
            return None
    return module


# --- modules of the program's own


def custom_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the outermost modules of user-defined classes, by name; the model itself is excluded."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if name and is_programs(type(module)) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def check_custom_modules(model: torch.nn.Module, built: torch.nn.Module | None) -> None:
    """Raise UnsupportedModelError if a user-defined module that no tiny model has ``built`` is not token-wise."""
    tried = {type(module) for module in built.modules()} if built is not None else set()
    for name, module in custom_modules(model).items():
        if type(module) not in tried and (problem := run_isolated(_problem, module)):
            cls = f"{type(module).__module__}.{type(module).__qualname__}"
            raise UnsupportedModelError(
                f"{name} is a {cls}, which no trial has seen, and {problem}: under sequence parallelism it would see "
                "a part of the sequence. Build it in the model's class, so that a small model of the class can be "
                "tried, or set sequence_parallel_size to 1."
            )


def _problem(module: torch.nn.Module) -> str:
    """Return why a module is not known to be token-wise, ``[1, S, H] -> [1, S, H']``; empty if it is."""
    import deepspeed

    training = module.training
    with torch.random.fork_rng([]), deepspeed.zero.GatheredParameters(list(module.parameters())):
        weight = next((param for param in module.parameters() if param.dim()), torch.zeros(_TOKENS))
        # A norm's weight has its input's width; without weights any width works.
        linears = (each.in_features for each in module.modules() if isinstance(each, torch.nn.Linear))

        def run(x: torch.Tensor) -> torch.Tensor:
            output = module(x)
            return output[0] if isinstance(output, tuple) else output

        def in_parts(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([run(x[:, :3]), run(x[:, 3:])], dim=1)

        module.eval()
        try:
            # Tokens before and after a part must not change its result.
            x_SH = random_tensors()(1, _TOKENS, next(linears, weight.shape[-1])).to(weight.device, weight.dtype)
            ulps = round(_CLOSE.get(x_SH.dtype, _CLOSE_IN_HALF) / torch.finfo(x_SH.dtype).eps)
            return "" if is_equivalent(run, in_parts, (x_SH.requires_grad_(),), ulps, ulps) else "mixes tokens"
        except Exception as error:
            return f"cannot be tried by itself ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
        finally:
            module.train(training)


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

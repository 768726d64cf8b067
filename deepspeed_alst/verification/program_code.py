"""Program code in a live model: methods, functions and hooks that no installed library defines.

The list of verified families holds for transformers' own code. All other code in a model is checked by comparing the
live model unsharded and sharded (model_check.py) for its forward, and by a trial of a tiny model of its kind, in which
the same code is installed here, for its backward.
"""

import functools
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import huggingface_hub
import torch

from deepspeed_alst.core.function_copies import with_objects
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model

_PACKAGES = ("/site-packages/", "/dist-packages/")
_HOOKS = {
    "_forward_pre_hooks": ("register_forward_pre_hook", "_forward_pre_hooks_with_kwargs"),
    "_forward_hooks": ("register_forward_hook", "_forward_hooks_with_kwargs"),
    "_backward_pre_hooks": ("register_full_backward_pre_hook", None),
    "_backward_hooks": ("register_full_backward_hook", None),
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


def is_library_module(name: str) -> bool:
    """Return True if a name in ``sys.modules`` is installed code; a script or a notebook is not."""
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if file is None:
        return isinstance(module, ModuleType) and name != "__main__"
    return any(folder in str(file) for folder in _PACKAGES) or str(file).startswith(_library_roots())


def is_programs(value: Any) -> bool:
    """Return True if any function in a callable, its decorators and closures is the program's own."""
    # Copies of functions have globals without a __name__ (function_copies.py).
    homes = (each.__globals__.get("__name__") or each.__module__ or "" for each in _functions(value, set()))
    return any(not is_library_module(home) for home in homes)


def is_custom_class(cls: type) -> bool:
    """Return True if the program, not a library, defines a class."""
    return not is_library_module(cls.__module__)


def _functions(value: Any, seen: set[int]) -> Iterator[FunctionType]:
    if id(value) in seen or len(seen) > 100:
        return
    seen.add(id(value))
    if isinstance(value, FunctionType):
        yield value
        for inner in (*_enclosed(value), getattr(value, "__wrapped__", None)):
            yield from _functions(inner, seen)
    elif isinstance(value, MethodType | classmethod | staticmethod):
        yield from _functions(value.__func__, seen)
    elif isinstance(value, functools.partial):
        yield from _functions(value.func, seen)
    elif isinstance(value, property):
        yield from _functions(value.fget, seen)
    elif not isinstance(value, type | torch.nn.Module) and isinstance(
        call := inspect.getattr_static(type(value), "__call__", None), FunctionType
    ):
        yield from _functions(call, seen)


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def program_code(model: torch.nn.Module) -> tuple[str, ...]:
    """Return the names of the program's own code that runs in a model; empty if there is none.

    Covered are the modules' classes, the source modules that define these, and methods and hooks of single modules. A
    class of the program's own counts as one.
    """
    classes = dict.fromkeys(cls for module in model.modules() for cls in type(module).__mro__ if cls is not object)
    own = [cls for cls in classes if is_custom_class(cls)]
    found = [f"{cls.__module__}.{cls.__qualname__}" for cls in own]
    libraries = [cls for cls in classes if cls not in own]
    for cls in libraries:
        found += [f"{cls.__qualname__}.{name}" for name, value in list(vars(cls).items()) if is_programs(value)]
    for home in dict.fromkeys(cls.__module__ for cls in libraries):
        functions = [each for each in vars(sys.modules[home]).items() if isinstance(each[1], FunctionType)]
        found += [f"{home}.{name}" for name, value in functions if is_programs(value)]
    for name, kind, _ in _installed(model):
        found.append(f"{kind} of {name or type(model).__name__}")
    return tuple(found)


def _installed(model: torch.nn.Module) -> Iterator[tuple[str, str, Callable[[torch.nn.Module], None]]]:
    """Yield program code on single modules: the module's name, its kind, and a function that installs it."""
    for name, module in model.named_modules():
        for attribute, value in list(vars(module).items()):
            if not callable(value) or isinstance(value, torch.nn.Module | type) or not hasattr(type(module), attribute):
                continue
            if is_programs(value) and not _is_wrapper(value):
                yield name, f"method '{attribute}'", functools.partial(_set_method, attribute, value)
        for attribute, (register, with_kwargs) in _HOOKS.items():
            for key, hook in list(vars(module)[attribute].items()):
                if is_programs(hook) and not _is_wrapper(hook):
                    options = {"with_kwargs": key in vars(module)[with_kwargs]} if with_kwargs else {}
                    yield name, "hook", functools.partial(_register, register, hook, options)


def _is_wrapper(value: Any) -> bool:
    """Return True if a callable is this package's or DeepSpeed's wrapper around the original."""
    names = (each.__globals__.get("__name__", "") for each in _functions(value, set()))
    return next((name for name in names if not name.startswith("torch.")), "").startswith("deepspeed")


def _set_method(name: str, value: Any, module: torch.nn.Module, moved: Callable[[Any], Any]) -> None:
    PatchSet().set(module, name, moved(value))


def _register(
    register: str, hook: Any, options: dict[str, Any], module: torch.nn.Module, moved: Callable[[Any], Any]
) -> None:
    getattr(module, register)(moved(hook), **options)


def install_program_code(model: torch.nn.Module, small: torch.nn.Module) -> torch.nn.Module:
    """Install the program code of single modules on a tiny model of the same kind; return the tiny model.

    Objects of the live model that the code reaches, by a closure or a bound method, become those of the tiny model.

    Raises:
        LookupError: the tiny model has no module of that name.
    """
    base = base_model(model)
    pairs = {id(model): small}
    for name, module in base.named_modules():
        if (other := _counterpart(small, name)) is not None:
            pairs[id(module)] = other
    moved = functools.partial(with_objects, replaced=lambda value: pairs.get(id(value), value))
    for name, kind, install in _installed(base):
        other = _counterpart(small, name)
        if other is None:
            raise LookupError(f"{kind} of {name}: a small model of the kind has no such module")
        install(other, moved)
    if base is not model:
        for _, _, install in (each for each in _installed(model) if each[0] == ""):
            install(small, moved)
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


def module_label(model: torch.nn.Module, name: str) -> str:
    """Return a module's name with its class, for a message."""
    return f"{name or 'the model'} ({type(model.get_submodule(name)).__name__})"

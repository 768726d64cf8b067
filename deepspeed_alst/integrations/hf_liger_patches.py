"""Liger's own patch of a model family, applied to one model only, with undo.

Liger's functions change a model's modules, and global names in transformers' modeling files that every model of the
family looks up. These names are restored at once. RoPE, which is called by such a name, reaches this model's attention
through a copy of its forward: the same code with another dict of globals.
"""

import sys
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from deepspeed_alst.core.function_copies import with_names
from deepspeed_alst.core.patching import ABSENT, PatchSet, set_entry
from deepspeed_alst.errors import UnsupportedModelError

# Parts of alst.liger_kernel by Liger's source modules.
_PARTS = {
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "swiglu": "swiglu",
    "geglu": "geglu",
    "relu_squared": "relu_squared",
    "rope": "rope",
    "llama4_rope": "rope",
    "qwen2vl_mrope": "rope",
}
# Activations that Liger's modules compute, whatever the config says.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}


class CannotPatchError(UnsupportedModelError):
    """Error for a part of a model that Liger would compute differently, or that user code has replaced."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part


class _Change(NamedTuple):
    """Changed name in a namespace, with its old and new value."""

    space: dict[str, Any]
    name: str
    before: Any
    now: Any


class _Watch:
    """Snapshot of namespaces, to find later changes."""

    def __init__(self, spaces: list[dict[str, Any]]) -> None:
        # dict.items, because a subclass may transform stored values.
        self._before = [(space, dict(dict.items(space))) for space in spaces]

    def changes(self) -> Iterator[_Change]:
        for space, before in self._before:
            for name, now in list(dict.items(space)):
                if name not in before or before[name] is not now:
                    yield _Change(space, name, before.get(name, ABSENT), now)


def is_ligers(thing: Any) -> bool:
    """Return True if a function, a method or a class comes from Liger."""
    return _origin(thing).split(".")[0] == "liger_kernel"


def has_ligers_modules(model: torch.nn.Module) -> bool:
    """Return True if a model already has Liger's modules, its loss aside."""
    return any(
        is_ligers(type(module)) or is_ligers(vars(module).get("forward"))
        for module in model.modules()
        if module is not model
    )


def patch(
    model: torch.nn.Module, apply: Callable[..., None], arguments: dict[str, bool], patches: PatchSet
) -> dict[str, int]:
    """Patch a model with Liger; return the number of patched modules per part.

    Args:
        model: a transformers model.
        apply: Liger's function for its family.
        arguments: arguments of that function, beside the model.
        patches: undoes everything. After an error there is nothing to undo.

    Raises:
        CannotPatchError: Liger would compute a module differently, or user code has replaced it.
    """
    owners = {id(space): module for module in model.modules() for space in (vars(module), module._modules)}
    replaced = {id(module) for module in model.modules() if "forward" in vars(module)}
    own = _Watch([space for module in model.modules() for space in (vars(module), module._modules)])
    shared = _Watch([*map(vars, _modeling_modules()), ACT2FN])
    counts: dict[str, set[int]] = {}
    with PatchSet().rollback_on_error() as done:
        try:
            apply(model=model, **arguments)
        finally:
            changed, names = list(own.changes()), list(shared.changes())
            for change in names:
                set_entry(change.space, change.name, change.before)
            for change in changed:
                done.record_entry(change.space, change.name, change.before)
        for change in changed:
            module, part = owners[id(change.space)], _part_of(change.now)
            if part is not None:
                _check(model, module, part, id(module) in replaced, change)
                counts.setdefault(part, set()).add(id(module))
        for change in names:
            if _part_of(change.now) == "rope" and isinstance(change.now, FunctionType):
                callers = _call_instead(model, change, replaced, done)
                counts.setdefault("rope", set()).update(callers)
        patches.absorb(done)
    return {part: len(modules) for part, modules in counts.items() if modules}


def _origin(thing: Any) -> str:
    """Return the name of the source module of a function, method or class; for an object, of its class."""
    return getattr(getattr(thing, "__func__", thing), "__module__", None) or ""


def _part_of(thing: Any) -> str | None:
    return _PARTS.get(_origin(thing).rpartition(".")[2]) if is_ligers(thing) else None


def _modeling_modules() -> list[Any]:
    """Return the loaded modeling modules of transformers."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and name.rpartition(".")[2].startswith("modeling_")
    ]


def _check(model: torch.nn.Module, module: torch.nn.Module, part: str, is_replaced: bool, change: _Change) -> None:
    """Raise if a module is not what Liger assumes: Liger binds its forward to any module.

    Raises:
        CannotPatchError: with the module's name and the reason.
    """
    name = _name_of(model, module)
    is_layer_norm = type(module) is torch.nn.LayerNorm and module.weight is not None and module.bias is not None
    if _origin(type(module)).split(".")[0] != "transformers" and not is_layer_norm:
        raise CannotPatchError(part, f"{name} is {_origin(type(module))}.{type(module).__name__}, not transformers'")
    if is_replaced:
        raise CannotPatchError(part, f"{name}.forward has been replaced by the program")
    if part not in _ACTIVATIONS:
        return
    found = change.before if part == "relu_squared" else _activation_of(module)
    values = torch.linspace(-6, 6, 97, device="cpu")
    if found is None or not torch.allclose(found(values), _ACTIVATIONS[part](values), rtol=0, atol=1e-6):
        kind = "no activation that is known" if found is None else f"the activation {type(found).__name__}"
        raise CannotPatchError(part, f"{name} has {kind}, and Liger would compute {part}")


def _activation_of(module: torch.nn.Module) -> Any:
    names = ("act_fn", "activation_fn", "act")
    return next((getattr(module, name) for name in names if callable(getattr(module, name, None))), None)


def _name_of(model: torch.nn.Module, module: torch.nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module) or type(model).__name__


def _call_instead(model: torch.nn.Module, change: _Change, replaced: set[int], patches: PatchSet) -> list[int]:
    """Give Liger's function to the modules whose forward looks its name up, and no others; return their ids.

    Raises:
        CannotPatchError: the forward of a module is not its class's.
    """
    found = []

    def names_for(function: FunctionType) -> dict[str, Any]:
        reads = function.__globals__ is change.space and change.name in function.__code__.co_names
        return {change.name: change.now} if reads else {}

    for module in model.modules():
        forward = type(module).forward
        copy = with_names(forward, names_for)
        if copy is forward:
            continue
        if id(module) in replaced:
            raise CannotPatchError("rope", f"{_name_of(model, module)}.forward has been replaced by the program")
        patches.forward(module, copy)
        found.append(id(module))
    return found

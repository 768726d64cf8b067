"""Liger's own patch of a model's family, on one model alone, and off again.

Liger's functions change a model's modules, and the names in transformers' modeling files that every model of the family
looks up. The latter go back at once. What is called by such a name, RoPE, this model's attention is given as a global
of its own: its forward is the same code with another dict of globals.
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

# Parts of alst.liger_kernel by the modules of Liger's that they come from.
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
# What Liger's modules compute whatever the config says.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}


class CannotPatchError(UnsupportedModelError):
    """One part of a model that Liger would compute otherwise, or that somebody else has replaced."""

    def __init__(self, part: str, message: str) -> None:
        super().__init__(message)
        self.part = part


class _Change(NamedTuple):
    """A name in a namespace, what it meant before and what it means now."""

    space: dict[str, Any]
    name: str
    before: Any
    now: Any


class _Watch:
    """Namespaces as they are now, to be compared with what they will be."""

    def __init__(self, spaces: list[dict[str, Any]]) -> None:
        # Of dict, also where a subclass makes another value of a stored one.
        self._before = [(space, dict(dict.items(space))) for space in spaces]

    def changes(self) -> Iterator[_Change]:
        for space, before in self._before:
            for name, now in list(dict.items(space)):
                if name not in before or before[name] is not now:
                    yield _Change(space, name, before.get(name, ABSENT), now)


def is_ligers(thing: Any) -> bool:
    """Whether a function, a method or a class comes from Liger."""
    return _origin(thing).split(".")[0] == "liger_kernel"


def has_ligers_modules(model: torch.nn.Module) -> bool:
    """Whether somebody has patched a model with Liger before, its loss aside."""
    return any(
        is_ligers(type(module)) or is_ligers(vars(module).get("forward"))
        for module in model.modules()
        if module is not model
    )


def patch(
    model: torch.nn.Module, apply: Callable[..., None], arguments: dict[str, bool], patches: PatchSet
) -> dict[str, int]:
    """Have Liger patch a model; returns the parts that took hold, and in how many modules each.

    Args:
        model: a transformers model.
        apply: Liger's function for its family.
        arguments: of that function, beside the model.
        patches: takes everything back. After an error there is nothing to take back.

    Raises:
        CannotPatchError: a module that Liger would compute otherwise, or that somebody else has replaced.
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
    """The name of the module that a function, a method or a class comes from; of an object, its class."""
    return getattr(getattr(thing, "__func__", thing), "__module__", None) or ""


def _part_of(thing: Any) -> str | None:
    return _PARTS.get(_origin(thing).rpartition(".")[2]) if is_ligers(thing) else None


def _modeling_modules() -> list[Any]:
    """Those of transformers' modeling files that are loaded."""
    return [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and name.rpartition(".")[2].startswith("modeling_")
    ]


def _check(model: torch.nn.Module, module: torch.nn.Module, part: str, is_replaced: bool, change: _Change) -> None:
    """Refuse a module that is not what Liger takes it for: Liger binds its forward whatever the module is.

    Raises:
        CannotPatchError: with its name and why.
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
    """Have the modules whose forward looks up a name find Liger's function there, and nobody else; returns their ids.

    Raises:
        CannotPatchError: the forward of one is not its class's.
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

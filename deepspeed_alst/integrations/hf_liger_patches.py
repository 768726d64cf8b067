"""Liger's own patch of a model family, applied to one model only, with undo.

Liger's functions change a model's modules, and global names in transformers' modeling files that every model of the
family looks up. All of it is taken back at once, and what one of Liger's parts has put into a module is applied again
if the part computes what the module does. RoPE, which is called by a global name, reaches this model's attention
through a copy of its forward: the same code with another dict of globals.
"""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from deepspeed_alst.core.function_copies import with_names
from deepspeed_alst.core.patching import ABSENT, PatchSet, set_entry
from deepspeed_alst.core.selfcheck import run_isolated

# Activations that Liger's modules compute, whatever the config says.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}
_PARTS = ("rms_norm", "layer_norm", "rope", *_ACTIVATIONS)


def is_ligers(thing: Any) -> bool:
    """Return True if a function, a method, or an object's class comes from Liger."""
    return (getattr(thing, "__module__", None) or "").split(".")[0] == "liger_kernel"


def patch(
    model: torch.nn.Module, apply: Callable[..., None], wanted: Mapping[str, bool | None], patches: PatchSet
) -> tuple[Counter[str], dict[str, str]]:
    """Patch a model with Liger, but for the parts that one of its modules does not fit.

    Args:
        model: a transformers model.
        apply: Liger's function for its family.
        wanted: parts to apply or not; for None, that function's default.
        patches: undoes everything.

    Returns:
        The number of patched modules by part, and the reasons against the parts left out.
    """
    parameters = inspect.signature(apply).parameters
    changes = _changes(model, apply, {name: value for name, value in wanted.items() if name in parameters})

    def names_for(function: FunctionType) -> Mapping[str, Any]:
        return {
            name: now
            for _, name, now in changes.get(id(function.__globals__), ())
            if _part_of(now) == "rope" and isinstance(now, FunctionType) and name in function.__code__.co_names
        }

    found, refused = [], {}
    for name, module in model.named_modules():
        own = [*changes.get(id(vars(module)), ()), *changes.get(id(module._modules), ())]
        forward = with_names(type(module).forward, names_for)
        calls_rope = forward is not type(module).forward
        part = "rope" if calls_rope else next(filter(None, (_part_of(now) for *_, now in own)), None)
        # Functions of composite models use those of other families, by their defaults.
        if part is not None and wanted[part] is not False:
            found.append((part, module, forward if calls_rope else None, own))
            reason = _reason_against(name, module, part)
            if reason:
                refused.setdefault(part, reason)
    counts: Counter[str] = Counter()
    for part, module, forward, own in found:
        if part not in refused:
            counts[part] += 1
            if forward is not None:
                patches.forward(module, forward)
            for change in own:
                patches.entry(*change)
    return counts, refused


def _changes(
    model: torch.nn.Module, apply: Callable[..., None], wanted: Mapping[str, bool | None]
) -> dict[int, list[tuple[dict[str, Any], str, Any]]]:
    """Call Liger's function and undo its changes of the model and of transformers.

    Returns:
        By the id of a namespace its changes: the namespace, a name and its new value.
    """
    spaces = [space for module in model.modules() for space in (vars(module), module._modules)]
    spaces += [
        vars(module)
        for name, module in sys.modules.items()
        if name.startswith("transformers.models.") and name.rpartition(".")[2].startswith("modeling_")
    ]
    # dict.items, because ACT2FN's class transforms stored values.
    before = [(space, dict(dict.items(space))) for space in [*spaces, ACT2FN]]
    changes: dict[int, list[tuple[dict[str, Any], str, Any]]] = {}
    try:
        apply(model=model, **{name: value for name, value in wanted.items() if value is not None})
    finally:
        for space, old in before:
            for name, now in list(dict.items(space)):
                if old.get(name, ABSENT) is not now:
                    changes.setdefault(id(space), []).append((space, name, now))
                    set_entry(space, name, old.get(name, ABSENT))
    return changes


def _part_of(thing: Any) -> str | None:
    """Return the part of ``alst.liger_kernel`` that an object of Liger's belongs to, by its source module."""
    # Some families have a RoPE of their own: llama4_rope, qwen2vl_mrope.
    return next((part for part in _PARTS if is_ligers(thing) and thing.__module__.endswith(part)), None)


def _reason_against(name: str, module: torch.nn.Module, part: str) -> str | None:
    """Return why a module is not what Liger assumes, or None: Liger binds its forward to any module."""
    cls = type(module)
    is_layer_norm = cls is torch.nn.LayerNorm and module.weight is not None and module.bias is not None
    if part != "rope" and cls.__module__.split(".")[0] != "transformers" and not is_layer_norm:
        return f"{name} is {cls.__module__}.{cls.__name__}, not transformers'"
    if "forward" in vars(module):
        return f"{name}.forward has been replaced by the program"
    if part not in _ACTIVATIONS:
        return None
    activations = (getattr(module, key, None) for key in ("act_fn", "activation_fn", "act"))
    found = next(filter(callable, activations), None)
    if found is not None and run_isolated(_agree, found, _ACTIVATIONS[part]):
        return None
    kind = "no activation that is known" if found is None else f"the activation {type(found).__name__}"
    return f"{name} has {kind}, and Liger would compute {part}"


def _agree(found: Callable[..., torch.Tensor], expected: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    values = torch.linspace(-6, 6, 97, device="cpu")
    return torch.allclose(found(values), expected(values), rtol=0, atol=1e-6)

"""Copies of a patched model, by copy.deepcopy, pickle or torch.save, without its patches.

A copy belongs to no engine, whose process groups and counters the patches would use. So a module is copied as before
patching, with its current weights, flags and the program's own later changes.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.utils import output_capturing

from deepspeed_alst.core.patching import ABSENT, PatchSet
from deepspeed_alst.errors import UnsupportedModelError

_REDUCE = "__reduce_ex__"
_CONTENTS = ("_parameters", "_buffers", "_modules")
# Copied at their current values; a config's copy has the public attention name.
_CURRENT = (*_CONTENTS, "training", "config")
_CAPTURING = "_output_capturing_hooks_installed"


def with_plain_copies(build: Callable[..., Any], model: torch.nn.Module, patches: PatchSet) -> Callable[..., Any]:
    """Return an engine builder that makes copies of a model, which is not patched yet, and of its modules unpatched.

    Changes made until ``build`` returns, also by other patches before it, are left out of copies.
    """
    before = {module: (type(module), _attributes(module)) for module in model.modules()}

    @functools.wraps(build)
    def build_and_seal(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        for module, (cls, attributes) in before.items():
            patches.set(module, _REDUCE, functools.partial(_reduce, module, cls, attributes, _attributes(module)))
        for param in model.parameters():
            if type(param) is torch.nn.Parameter:
                patches.set(param, _REDUCE, functools.partial(_reduce_weight, param))
        return built

    return build_and_seal


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    attributes = ((key, value) for key, value in vars(module).items() if key not in _CURRENT)
    return {key: dict(value) if _has_hooks(key, value) else value for key, value in attributes}


def _has_hooks(key: str, value: Any) -> bool:
    """Return True if a torch module's attribute holds hooks, or their properties, by number."""
    return isinstance(value, dict) and "_hooks" in key


def _unpatched(module: torch.nn.Module, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return a module's current attributes without the changes from ``before`` to ``after``."""
    found = {}
    for key, value in vars(module).items():
        if key in _CONTENTS:
            value = dict(value.items())  # ZeRO sets a dict class of its own
        elif _has_hooks(key, value):
            added = after.get(key, {}).keys() - before.get(key, {}).keys()
            value = type(value)((i, hook) for i, hook in value.items() if i not in added and not _captures(hook))
        elif key not in _CURRENT:
            value = getattr(value, "alst_original", value)  # wrapped by core/checkpoint_hook.py
            value = before.get(key, ABSENT) if value is after.get(key, ABSENT) else value
        if value is not ABSENT and key not in (_REDUCE, _CAPTURING):
            found[key] = value
    return found


def _captures(hook: Any) -> bool:
    """Return True for the hook of transformers' first forward, which cannot pickle and is reinstalled on use."""
    return getattr(hook, "__module__", "") == output_capturing.__name__


def _reduce(
    module: torch.nn.Module, cls: type, before: dict[str, Any], after: dict[str, Any], protocol: Any
) -> tuple[Any, ...]:
    """Implement ``module.__reduce_ex__`` for the unpatched module."""
    for param in module.parameters():
        if hasattr(param, "ds_status") and param.ds_status.name != "AVAILABLE":
            raise UnsupportedModelError(
                f"{cls.__name__} cannot be copied or pickled under ZeRO 3: its weights are split over the ranks. Copy "
                "it before deepspeed.initialize, or within deepspeed.zero.GatheredParameters(model.parameters()); to "
                "save it: engine.save_checkpoint"
            )
    plain = cls.__new__(cls)
    torch.nn.Module.__setstate__(plain, _unpatched(module, before, after))
    function, arguments, *state = cls.__reduce_ex__(plain, protocol)
    if function is copyreg.__newobj__:  # pickle rejects it if the object's class has changed
        function, arguments = copyreg._reconstructor, (cls, object, None)
    return function, arguments, *state


def _reduce_weight(param: torch.nn.Parameter, protocol: Any) -> Any:
    """Reduce a parameter without DeepSpeed's attributes; clone it if it is part of a larger buffer."""
    data = param.detach()
    if data.untyped_storage().nbytes() > data.nbytes:
        data = data.clone()
    return torch._utils._rebuild_parameter, (data, param.requires_grad, {})

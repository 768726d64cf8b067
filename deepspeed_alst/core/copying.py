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
    before = {module: (type(module), _shallow(module)) for module in model.modules()}

    @functools.wraps(build)
    def build_and_seal(*args: Any, **kwargs: Any) -> Any:
        built = build(*args, **kwargs)
        for module, (cls, attributes) in before.items():
            changes = _Changes(cls, attributes, _shallow(module))
            patches.set(module, _REDUCE, functools.partial(_reduce, module, changes))
        for param in model.parameters():
            if type(param) is torch.nn.Parameter:
                patches.set(param, _REDUCE, functools.partial(_reduce_weight, param))
        return built

    return build_and_seal


class _Changes:
    """Changes to one module: its class and attributes before, its attributes after."""

    def __init__(self, cls: type, before: dict[str, Any], after: dict[str, Any]) -> None:
        self.cls = cls
        self._hooks = {
            key: value.keys() - before.get(key, {}).keys() for key, value in after.items() if _has_hooks(key, value)
        }
        self._values = {
            key: (before.get(key, ABSENT), value)
            for key, value in after.items()
            if before.get(key, ABSENT) is not value and key not in (*self._hooks, *_CURRENT)
        }

    def without(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """Return a module's current attributes without the recorded changes."""
        left = {}
        for key, value in attributes.items():
            if key in _CONTENTS:
                value = dict(value.items())  # ZeRO sets a dict class of its own
            elif key in self._hooks:
                added = self._hooks[key]
                value = type(value)((i, hook) for i, hook in value.items() if i not in added and not _captures(hook))
            else:
                value = getattr(value, "alst_before", value)  # wrapped by offload/checkpoint_hook.py
            before, after = self._values.get(key, (ABSENT, ABSENT))
            value = before if value is after else value
            if value is not ABSENT and key not in (_REDUCE, _CAPTURING):
                left[key] = value
        return left


def _shallow(module: torch.nn.Module) -> dict[str, Any]:
    return {key: dict(value) if _has_hooks(key, value) else value for key, value in vars(module).items()}


def _has_hooks(key: str, value: Any) -> bool:
    """Return True if a torch module's attribute holds hooks, or their properties, by number."""
    return isinstance(value, dict) and "_hooks" in key


def _captures(hook: Any) -> bool:
    """Return True for the hook of transformers' first forward, which cannot pickle and is reinstalled on use."""
    return getattr(hook, "__module__", "") == output_capturing.__name__


def _reduce(module: torch.nn.Module, changes: _Changes, protocol: Any) -> Any:
    """Implement ``module.__reduce_ex__`` for the unpatched module."""
    for param in module.parameters():
        if hasattr(param, "ds_status") and param.ds_status.name != "AVAILABLE":
            raise UnsupportedModelError(
                f"{changes.cls.__name__} cannot be copied or pickled under ZeRO 3: its weights are split over the "
                "ranks. Copy it before deepspeed.initialize, or within "
                "deepspeed.zero.GatheredParameters(model.parameters()); to save it: engine.save_checkpoint"
            )
    twin = changes.cls.__new__(changes.cls)
    vars(twin).update(changes.without(vars(module)))
    function, arguments, *state = changes.cls.__reduce_ex__(twin, protocol)
    if function is copyreg.__newobj__:  # pickle rejects it if the object's class has changed
        function, arguments = copyreg._reconstructor, (changes.cls, object, None)
    return function, arguments, *state


def _reduce_weight(param: torch.nn.Parameter, protocol: Any) -> Any:
    """Reduce a parameter without DeepSpeed's attributes; clone it if it is part of a larger buffer."""
    data = param.detach()
    if data.untyped_storage().nbytes() > data.nbytes:
        data = data.clone()
    return torch._utils._rebuild_parameter, (data, param.requires_grad, {})

"""A model's own config, and the private name of its attention implementation in it.

transformers compares the name with texts (``== "sdpa"``, ``"flash" in name``) and looks it up in its interfaces. The
comparisons must see the backend that runs, and the lookup this model's entry, which no other model must find.
"""

import copy
from typing import Any

import torch

from deepspeed_alst.core.patching import ABSENT, PatchSet, set_entry


class PrivateName(str):
    """Backend name that is hashed by object identity, so that a dict's entry is found by this object alone.

    A copy, deep or pickled, is the plain text: it belongs to another model, which has no entry.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def own_config(model: torch.nn.Module, shared: Any, patches: PatchSet) -> Any:
    """Give a model, and its modules, its own copy of a config that other models may share; return the copy.

    Values that the program changes in it meanwhile (``use_cache``, token ids) are written back on undo.
    """
    own, original = copy.deepcopy(shared), copy.deepcopy(shared)

    def write_back() -> None:
        for name in vars(own).keys() | vars(original).keys():
            value = vars(own).get(name, ABSENT)
            # Modules inside have their own configs; not all of these can be compared.
            if not hasattr(type(value), "to_diff_dict") and value != vars(original).get(name, ABSENT):
                set_entry(vars(shared), name, value)

    # Only in a module's own __dict__: wrappers forward attribute reads to the model inside.
    for module in [module for module in model.modules() if vars(module).get("config") is shared]:
        patches.set(module, "config", own)
    patches.callback(write_back)
    return own


def under_own_name(module: torch.nn.Module, name: str, **replaced: Any) -> Any:
    """Return a view of an attention module whose config has the backend's transformers name.

    With the private name transformers would load the kernel again and register it over the model's own entry.
    """
    return _View(module, config=_View(module.config, _attn_implementation=name), **replaced)


class _View:
    """View of an object with some attributes replaced."""

    def __init__(self, seen: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)

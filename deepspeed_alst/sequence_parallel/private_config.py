"""A model's own config, and the name of its attention implementation in it, for as long as a patch changes them.

transformers uses the name in two ways. Its special cases read it (``== "sdpa"``, ``"flash" in name``, a regular
expression) and must see the backend that runs. Its interfaces look it up in a dict and must find this model's entry,
while every other model in the process finds the original one.
"""

import copy
from typing import Any

import torch

from deepspeed_alst.core.patching import ABSENT, PatchSet, set_entry


class PrivateName(str):
    """Text of a backend's name, hashed by object identity.

    A dict compares hashes before keys, so an entry under this object is found by this object alone, and an entry under
    the same text by all other strings. A copy, deep or pickled, is the plain text: it belongs to another model, which
    has no entry.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def own_config(model: torch.nn.Module, shared: Any, patches: PatchSet) -> Any:
    """Give a model its own copy of a config that other models may share; return the copy.

    Values that the program changes in it meanwhile (``use_cache``, token ids) are written back on undo.

    Args:
        model: the model; each of its modules that holds the config gets the copy.
        shared: the config.
        patches: undo stack.
    """
    own, as_it_was = copy.deepcopy(shared), copy.deepcopy(shared)
    # Only in a module's own __dict__: wrappers forward attribute reads to the model inside.
    holders = [module for module in model.modules() if vars(module).get("config") is shared]

    def give_back() -> None:
        for name, value in vars(own).items():
            if name not in vars(as_it_was) or vars(as_it_was)[name] != value:
                set_entry(vars(shared), name, value)
        for name in vars(as_it_was).keys() - vars(own).keys():
            set_entry(vars(shared), name, ABSENT)

    for module in holders:
        patches.set(module, "config", own)
    patches.callback(give_back)
    return own

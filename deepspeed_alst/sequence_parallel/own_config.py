"""Private config of one model, for as long as a patch changes it."""

import copy
from typing import Any

import torch

from deepspeed_alst.core.patching import ABSENT, PatchSet, set_entry


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

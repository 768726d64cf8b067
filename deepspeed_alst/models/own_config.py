"""A config that one model has for itself, for as long as something is patched in it."""

import copy
from typing import Any

import torch

from deepspeed_alst.core.patching import ABSENT, PatchSet, set_entry


def own_config(model: torch.nn.Module, shared: Any, patches: PatchSet) -> Any:
    """A config of the model's own: two models built from one config object share it, and only one is to change.

    What the program changes in it meanwhile (``use_cache``, token ids) goes back with it.

    Args:
        model: all of its modules that hold the config are given the own one.
        shared: the config.
        patches: takes it back.
    """
    own, as_it_was = copy.deepcopy(shared), copy.deepcopy(shared)
    # In their own __dict__: wrappers answer for the model inside, and must not be given what they do not hold.
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

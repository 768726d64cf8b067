"""A config that one model has for itself, for as long as something is patched in it."""

import copy
from contextlib import ExitStack
from typing import Any

import torch


def own_config(model: torch.nn.Module, shared: Any, undo: ExitStack) -> Any:
    """A config of the model's own: two models built from one config object share it, and only one is to change.

    What the program changes in it meanwhile (``use_cache``, token ids) goes back with it.

    Args:
        model: all of its modules that hold the config are given the own one.
        shared: the config.
        undo: takes it back.
    """
    own, as_it_was = copy.deepcopy(shared), copy.deepcopy(shared)
    # In their own __dict__: wrappers answer for the model inside, and must not be given what they do not hold.
    holders = [module for module in model.modules() if vars(module).get("config") is shared]

    def give(config: Any) -> None:
        for module in holders:
            module.config = config

    def give_back() -> None:
        for name, value in vars(own).items():
            if name not in vars(as_it_was) or vars(as_it_was)[name] != value:
                vars(shared)[name] = value
        for name in vars(as_it_was).keys() - vars(own).keys():
            vars(shared).pop(name, None)
        give(shared)

    give(own)
    undo.callback(give_back)
    return own

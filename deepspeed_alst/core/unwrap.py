"""Access to the transformers model inside the wrappers passed to ``deepspeed.initialize``."""

import sys

import torch


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model inside nested wrappers of PEFT and torch.compile; itself if it is not wrapped.

    Reads and patches of a transformers model use this one. Hooks that must see every call belong on the outermost
    module: a wrapper may call ``forward`` of the model inside, which runs no hooks.
    """
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif is_peft(model):
            model = model.get_base_model()
        else:
            return model


def is_peft(model: torch.nn.Module) -> bool:
    """Return True if a model is PEFT's wrapper, without importing PEFT, which takes seconds."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)

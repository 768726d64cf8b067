"""The transformers model inside the wrappers that a program may hand to ``deepspeed.initialize``."""

import sys

import torch


def base_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside PEFT's and torch.compile's wrappers, one within the other; itself if there is none.

    What is read from or changed in a transformers model belongs to this one. Hooks that must see every call belong to
    the outermost: a wrapper may call ``forward`` of the model inside, which runs no hooks.
    """
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif is_peft(model):
            model = model.get_base_model()
        else:
            return model


def is_peft(model: torch.nn.Module) -> bool:
    """Whether a model is PEFT's wrapper; nothing is one as long as nobody has imported PEFT, which takes seconds."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)

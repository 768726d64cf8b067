"""The transformers model inside the wrappers that a program may hand to ``deepspeed.initialize``."""

import sys

import torch

from deepspeed_alst.data.checks import Vocabulary


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


def vocabulary_of(model: torch.nn.Module) -> Vocabulary:
    """How many tokens a transformers model has embeddings for, and logits by its config or head, whichever has more."""
    base = base_model(model)
    embeddings = getattr(base.get_input_embeddings(), "num_embeddings", None)
    head = base.get_output_embeddings()
    sizes = (getattr(base.config.get_text_config(), "vocab_size", None), getattr(head, "out_features", None))
    logits = max((size for size in sizes if isinstance(size, int)), default=None)
    return Vocabulary(embeddings if isinstance(embeddings, int) else None, logits)


def is_peft(model: torch.nn.Module) -> bool:
    """Whether a model is PEFT's wrapper; nothing is one as long as nobody has imported PEFT, which takes seconds."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel | peft.PeftMixedModel)

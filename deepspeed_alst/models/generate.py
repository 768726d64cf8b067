"""Generation between steps: every rank holds the whole prompt, so the model is for that time what it was."""

import functools
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.models.calls import Calls


def generate_whole(model: torch.nn.Module, calls: Calls, patches: PatchSet) -> None:
    """Run ``model.generate`` without sequence parallelism; ``patches.close()`` takes it back.

    Every rank generates from the prompts that it is given, as at SP 1, with transformers' own attention and caches.

    Args:
        model: the transformers model.
        calls: what looks at its forwards.
        patches: takes the way back.
    """
    if not hasattr(model, "generate"):
        return
    original = model.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with calls.unsplit(model.config):
            return original(*args, **kwargs)

    patches.set(model, "generate", generate)

"""Generation between steps: every rank has the full prompt and runs without sequence parallelism."""

import functools
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext


def generate_whole(model: torch.nn.Module, calls: ForwardContext, patches: PatchSet) -> None:
    """Run ``model.generate`` without sequence parallelism; ``patches.close()`` undoes it.

    Every rank generates from its own prompts, as at SP 1, with transformers' own attention and caches.

    Args:
        model: the transformers model.
        calls: counters of its forwards, which generation bypasses.
        patches: undoes it.
    """
    if not hasattr(model, "generate"):
        return
    original = model.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        with calls.unsplit(model.config):
            return original(*args, **kwargs)

    patches.set(model, "generate", generate)

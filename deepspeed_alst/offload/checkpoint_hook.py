"""Single attachment point for wrappers and callbacks around transformers' activation checkpoint of a decoder layer.

``GradientCheckpointingLayer`` runs ``self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)``,
reentrant or not. The function is replaced on the layer instance at each call, because user code may enable
checkpointing at any time; the wrapper calls the original, which is restored on undo.
"""

from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet

Checkpoint = Callable[..., Any]
"""``(function, *args) -> outputs``: runs a layer in the forward and again in the backward."""

_FUNCTION = "_gradient_checkpointing_func"
_SEAM = "alst_checkpoint_seam"


class CheckpointHook:
    """Wrappers and callbacks of one layer's checkpoint; ``checkpoint_hook_of`` creates one per layer."""

    def __init__(self) -> None:
        # Wrappers of the checkpoint, the last one outermost; callbacks with the outputs of each run with gradients.
        self.around: list[Callable[[Checkpoint], Checkpoint]] = []
        self.at_end: list[Callable[[Any], None]] = []

    def __deepcopy__(self, memo: Any) -> "CheckpointHook":
        """Return the hook itself: a copy of the model shares it, as it shares the checkpoint function."""
        return self

    def wrap(self, checkpoint: Checkpoint) -> Any:
        """Wrap a checkpoint in all wrappers and callbacks."""

        def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = function(*args, **kwargs)
                for each in self.at_end if torch.is_grad_enabled() else []:
                    each(output)
                return output

            return checkpoint(run if self.at_end else function, *args, **kwargs)

        wrapped = watched
        for each in self.around:
            wrapped = each(wrapped)
        return wrapped


def checkpoint_hook_of(layer: torch.nn.Module, patches: PatchSet) -> CheckpointHook:
    """Return a layer's hook, created at first use and removed when the ``patches`` of that call closes."""
    existing = vars(layer).get(_SEAM)
    if existing is not None:
        return existing
    seam = CheckpointHook()
    patches.set(layer, _SEAM, seam)

    def put_on(*_: Any) -> None:
        checkpoint = vars(layer).get(_FUNCTION)
        if checkpoint is not None and not hasattr(checkpoint, "alst_before"):
            wrapped = seam.wrap(checkpoint)
            wrapped.alst_before = checkpoint
            patches.set(layer, _FUNCTION, wrapped)

    patches.hook(layer, "forward_pre", put_on)
    return seam

"""Single attachment point for wrappers and callbacks around transformers' activation checkpoint of a decoder layer.

``GradientCheckpointingLayer`` runs ``self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)``,
reentrant or not. The function is replaced on the layer instance at each call, because user code may enable
checkpointing at any time; the wrapper calls the original, which is restored on undo.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet

Checkpoint = Callable[..., Any]
"""``(function, *args) -> outputs``: runs a layer in the forward and again in the backward."""

_FUNCTION = "_gradient_checkpointing_func"
_HOOK = "alst_checkpoint_hook"


class CheckpointHook:
    """Wrappers and callbacks of one layer's checkpoint; ``checkpoint_hook_of`` creates one per layer."""

    def __init__(self) -> None:
        # Wrappers of the checkpoint, the last one outermost; callbacks with the outputs of each run with gradients.
        self.wrappers: list[Callable[[Checkpoint], Checkpoint]] = []
        self.at_end: list[Callable[[Any], None]] = []
        self.recomputing = False
        """True while a checkpoint runs the layer again; an outer checkpoint's recomputation is a new forward to it."""

    def __deepcopy__(self, memo: Any) -> "CheckpointHook":
        """Return the hook itself, which a copy of the model shares as it does the checkpoint function."""
        return self

    def wrap(self, checkpoint: Checkpoint) -> Any:
        """Wrap a checkpoint in all wrappers and callbacks."""

        def wrapped(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            is_first = True

            def run(*args: Any, **kwargs: Any) -> Any:
                before, self.recomputing = self.recomputing, not is_first
                try:
                    output = function(*args, **kwargs)
                finally:
                    self.recomputing = before
                for callback in self.at_end if torch.is_grad_enabled() else []:
                    callback(output)
                return output

            try:
                return checkpoint(run if self.at_end else function, *args, **kwargs)
            finally:
                is_first = False

        return functools.reduce(lambda inner, wrap: wrap(inner), self.wrappers, wrapped)


def checkpoint_hook_of(layer: torch.nn.Module, patches: PatchSet) -> CheckpointHook:
    """Return a layer's hook, created at first use and removed when the ``patches`` of that call closes."""
    existing = vars(layer).get(_HOOK)
    if existing is not None:
        return existing
    hook = CheckpointHook()
    patches.set(layer, _HOOK, hook)

    def wrap_checkpoint(*_: Any) -> None:
        checkpoint = vars(layer).get(_FUNCTION)
        if checkpoint is not None and not hasattr(checkpoint, "alst_original"):
            wrapped = hook.wrap(checkpoint)
            wrapped.alst_original = checkpoint
            patches.set(layer, _FUNCTION, wrapped)

    patches.hook(layer, "forward_pre", wrap_checkpoint)
    return hook

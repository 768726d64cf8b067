"""Where transformers checkpoints a decoder layer: the one place that what happens around a checkpoint is hung on.

``GradientCheckpointingLayer`` runs ``self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)``,
reentrant or not. The function is replaced on the layer alone, at each call, as a program may switch checkpointing on at
any time; what it was stays in it and is given back.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from deepspeed_alst.core.patching import PatchSet

Checkpoint = Callable[..., Any]
"""``(function, *args) -> outputs``: runs a layer now, and again in the backward."""

_FUNCTION = "_gradient_checkpointing_func"
_SEAM = "alst_checkpoint_seam"


class Seam:
    """What is hung on one layer's checkpoint; ``seam_of`` makes one for each layer."""

    def __init__(self) -> None:
        self.around: list[Callable[[Checkpoint], Checkpoint]] = []
        """Wrap the checkpoint, the last one outermost."""
        self.at_end: list[Callable[[Any], None]] = []
        """Called with the outputs of each run of the layer that has a graph."""

    def __deepcopy__(self, memo: Any) -> "Seam":
        """A copy of the model is another's to train: it shares what hangs here, as it shares the checkpoint itself."""
        return self

    def wrap(self, checkpoint: Checkpoint) -> Any:
        """The checkpoint with all of it."""

        def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.at_end:
                return checkpoint(function, *args, **kwargs)

            def run(*args: Any, **kwargs: Any) -> Any:
                output = function(*args, **kwargs)
                if torch.is_grad_enabled():
                    for each in self.at_end:
                        each(output)
                return output

            return checkpoint(run, *args, **kwargs)

        wrapped = watched
        for each in self.around:
            wrapped = each(wrapped)
        return wrapped


def seam_of(layer: torch.nn.Module, patches: PatchSet) -> Seam:
    """The seam of a layer; made when it is first asked for, and gone when the ``patches`` of that time closes."""
    existing = vars(layer).get(_SEAM)
    if existing is not None:
        return existing
    seam = Seam()
    patches.set(layer, _SEAM, seam)

    def put_on(*_: Any) -> None:
        checkpoint = vars(layer).get(_FUNCTION)
        if checkpoint is None or hasattr(checkpoint, "alst_before"):
            return
        wrapped = seam.wrap(checkpoint)
        wrapped.alst_before = checkpoint
        patches.set(layer, _FUNCTION, wrapped)

    patches.hook(layer, "forward_pre", put_on)
    return seam


def checkpointed_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that transformers checkpoints one by one, in the model's order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]

"""A model whose forward is Liger's, which makes its loss of hidden states: it is asked for logits instead.

Liger's ``lce_forward`` calls the head and ``self.loss_function`` when it is told not to skip the logits, as every other
forward does; under this package these are the tiled head and the loss of the whole sequence.
"""

import functools
import inspect
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.models.liger_patches import is_ligers
from deepspeed_alst.models.wrapped import base_model

_ARGUMENT = "skip_logits"


def use_own_loss(model: torch.nn.Module, patches: PatchSet) -> bool:
    """Have a model that Liger has patched make its loss by its head and ``loss_function``; whether it is one.

    The HF Trainer does it with ``use_liger_kernel``, and a program by Liger's functions, before or after the model is
    built. Nothing happens to any other model. ``patches`` takes it back.
    """
    base = base_model(model)
    before = base.forward
    if not is_ligers(before) or _ARGUMENT not in inspect.signature(before).parameters:
        return False

    # Not by a hook: PEFT's wrapper calls forward. A method, so that a copy of the model calls its own.
    @functools.wraps(before.__func__)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return before.__func__(self, *args, **{**kwargs, _ARGUMENT: False})

    patches.forward(base, forward)
    return True

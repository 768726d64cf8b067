"""Make a Liger-patched model compute logits instead of a loss from its hidden states.

With ``skip_logits=False`` Liger's ``lce_forward`` calls the head and ``self.loss_function``, as every other forward
does; under this package these are the tiled head and the loss of the full sequence.
"""

import functools
import inspect
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.integrations.hf_liger_patches import is_ligers

_ARGUMENT = "skip_logits"


def use_own_loss(model: torch.nn.Module, patches: PatchSet) -> bool:
    """Make a Liger-patched model use its head and ``loss_function``; return True if it is one.

    The HF Trainer patches with ``use_liger_kernel``, user code with Liger's functions, before or after the model is
    built. All other models stay unchanged. ``patches`` undoes it.
    """
    base = base_model(model)
    before = base.forward
    if not is_ligers(before) or _ARGUMENT not in inspect.signature(before).parameters:
        return False

    # PEFT's wrapper calls forward directly, bypassing hooks. A method, so that a copy of the model binds its own.
    @functools.wraps(before.__func__)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return before.__func__(self, *args, **{**kwargs, _ARGUMENT: False})

    patches.forward(base, forward)
    return True

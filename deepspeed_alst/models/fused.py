"""RMSNorm and rotary embedding of a model by this package's fused ops, if Liger's are not in use."""

from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.kernels.registry import has_kernel
from deepspeed_alst.models.fused_norms import fuse_norms
from deepspeed_alst.models.fused_rope import fuse_rope


def fuse_norms_and_rope(model: Any, patches: PatchSet) -> str:
    """Replace a model's RMSNorm and rotary embedding by fused ops; return a summary.

    The ops save only tensors for the backward that stay alive anyway. Modules not proven to compute the same stay
    unchanged, as do all on devices without the kernels.

    Args:
        model: a transformers model, or a wrapper around one, before its engine is built.
        patches: undoes everything.
    """
    device, parts = torch.device("cuda" if torch.cuda.is_available() else "cpu"), []
    if isinstance(model, torch.nn.Module):  # DeepSpeed rejects anything else
        if all(has_kernel(name, device) for name in ("rms_norm", "rms_norm_backward")):
            parts.append(_counted(fuse_norms(model, patches)))
        if has_kernel("rope", device):
            parts.append(_counted(fuse_rope(model, patches), " (rotary embedding)"))
    words = " and ".join(part for part in parts if part)
    return f"{words} by a kernel, recomputed in the backward" if words else "the model's own"


def _counted(classes: dict[str, int], what: str = "") -> str:
    return ", ".join(f"{count} {name}{what}" for name, count in classes.items())

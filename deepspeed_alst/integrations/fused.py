"""RMSNorm and rotary embedding of a model by this package's fused ops, if Liger's are not in use."""

from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.integrations.fused_norms import fuse_norms
from deepspeed_alst.integrations.fused_rope import fuse_rope
from deepspeed_alst.kernels.registry import has_kernel


def fuse_norms_and_rope(model: Any, patches: PatchSet) -> str:
    """Replace a model's RMSNorm and rotary embedding by fused ops; return a summary.

    The ops save only tensors for the backward that stay alive anyway. Modules not proven to compute the same stay
    unchanged, as do all on a GPU without the kernels. On CPU, where only plans and tests come, torch computes.

    Args:
        model: a transformers model, or a wrapper around one, before its engine is built.
        patches: undoes everything.
    """
    parts = []
    if isinstance(model, torch.nn.Module):  # DeepSpeed rejects anything else
        if _run("rms_norm", "rms_norm_backward"):
            parts.append(_counted(fuse_norms(model, patches)))
        if _run("rope"):
            parts.append(_counted(fuse_rope(model, patches), " (rotary embedding)"))
    words = " and ".join(part for part in parts if part)
    return f"{words} by a kernel, recomputed in the backward" if words else "the model's own"


def _run(*names: str) -> bool:
    return not torch.cuda.is_available() or all(has_kernel(name, torch.device("cuda")) for name in names)


def _counted(classes: dict[str, int], what: str = "") -> str:
    return ", ".join(f"{count} {name}{what}" for name, count in classes.items())

"""Embeddings of a forward, which are freed once the first layer has saved them."""

import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.tiling.gated_mlp import is_foreign


class Embeddings:
    """Memory of the embeddings in a forward, which the decoder's own frame would hold until its end."""

    def __init__(self, spec: ModelSpec, calls: ForwardContext, patches: PatchSet) -> None:
        self._calls, self._storage = calls, lambda: None
        if spec.embeddings is not None:
            patches.hook(spec.embeddings, "forward", self._note)

    def _note(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        is_decoders = self._calls.inside and isinstance(output, torch.Tensor) and not is_watched(module)
        self._storage = weakref.ref(output.untyped_storage()) if is_decoders else lambda: None

    def release(self, layer: torch.nn.Module, x_BsM: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Free the embeddings if they are a layer's saved input and nothing else can read them.

        A read of them would raise: torch checks that a tensor's memory is there.
        """
        storage, self._storage = self._storage(), lambda: None
        others = [each for each in tree_leaves(kwargs) if isinstance(each, torch.Tensor)]
        if storage is None or storage._cdata != x_BsM.untyped_storage()._cdata or is_watched(layer):
            return
        if not any(each.untyped_storage()._cdata == storage._cdata for each in others):
            storage.resize_(0)


def is_watched(module: torch.nn.Module) -> bool:
    """Return True if a hook of the program sees a module's inputs or outputs, or one of transformers keeps them."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # transformers.modeling_utils marks embeddings as requiring a gradient.
    return any(is_foreign(hook) and hook.__module__ != "transformers.modeling_utils" for hook in hooks)

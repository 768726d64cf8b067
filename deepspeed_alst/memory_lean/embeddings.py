"""Embeddings of a forward, which are freed once the first layer has saved them."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.tiling.gated_mlp import is_user_hook


class Embeddings:
    """Memory of the embeddings in a forward, which the decoder's own frame would hold until its end."""

    def __init__(self, spec: ModelSpec, calls: ForwardContext, patches: PatchSet) -> None:
        self._calls, self._seen = calls, list[Callable[[], torch.Tensor | None]]()
        if spec.embeddings is not None:
            patches.hook(spec.embeddings, "forward", self._note_output)
        for layer in list(spec.layers.values())[:1]:
            # Before DeepSpeed's hooks, which give the layer another tensor over the same memory.
            patches.hook(layer, "forward_pre", self._note_input)

    def _note_output(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        is_decoders = self._calls.inside and isinstance(output, torch.Tensor) and not is_watched(module)
        self._seen = [weakref.ref(output)] if is_decoders else []

    def _note_input(self, module: torch.nn.Module, args: Any) -> None:
        if self._seen and args and isinstance(args[0], torch.Tensor):
            self._seen.append(weakref.ref(args[0]))

    def release(self, layer: torch.nn.Module, x_BsM: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Free the embeddings if they are a layer's saved input and none of its other arguments.

        What still refers to them reads NaN; other tensors over the same memory keep it.
        """
        seen, self._seen = [each for ref in self._seen if (each := ref()) is not None], []
        memory = x_BsM.untyped_storage()._cdata
        others = [each for each in tree_leaves(kwargs) if isinstance(each, torch.Tensor) and each is not x_BsM]
        if not seen or seen[0].untyped_storage()._cdata != memory or is_watched(layer):
            return
        if not any(each.untyped_storage()._cdata == memory for each in others):
            for each in (*seen, x_BsM):
                each.data = each.new_full((), torch.nan).expand(each.shape)


def is_watched(module: torch.nn.Module, but: tuple[str, ...] = ()) -> bool:
    """Return True if a hook of the program sees a module's inputs or outputs, or one of transformers keeps them.

    Args:
        module: the module.
        but: modules of the code whose hooks do not count.
    """
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # transformers.modeling_utils marks embeddings as requiring a gradient.
    return any(is_user_hook(hook) and hook.__module__ not in ("transformers.modeling_utils", *but) for hook in hooks)

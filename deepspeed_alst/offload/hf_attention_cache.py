"""Attention cache of a model without sequence parallelism; under it, hf_attention.py saves the outputs.

The model's attention function runs unchanged, with transformers' own masks and arguments, within a frame that saves its
output. It is registered under a private name in transformers' interfaces (sequence_parallel/private_config.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.offload.attention_cache import attend_cached, saving_frame
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.hf_attention import find_backend, read_call
from deepspeed_alst.sequence_parallel.hf_masks import MaskSpec
from deepspeed_alst.sequence_parallel.private_config import PrivateName, own_config, under_own_name


def cache_attention(model: torch.nn.Module, patches: PatchSet, calls: ForwardContext | None = None) -> None:
    """Save attention's output in frames that request it; ``patches.close()`` undoes it.

    The model's configs are replaced by copies. Memory-lean layers answer calls by ``calls.answer_attention``.

    Raises:
        UnsupportedModelError: no attention of the model runs as operators whose output can be saved.
    """
    check_attention_can_be_saved(model)
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    for config in _attention_configs(model):
        name = config._attn_implementation
        if not _can_be_saved(name):
            continue
        assert not isinstance(name, PrivateName), "under sequence parallelism hf_attention.py saves the output"
        own, private = own_config(model, config, patches), PrivateName(name)
        patches.entry(functions, private, _caching_function(name, functions[name], calls))
        # transformers builds no mask for a name missing from the mask interface, the original or the private one.
        if name in masks:
            patches.entry(masks, private, masks[name])
        # The property would also set it in the configs of submodels.
        patches.set(own, "_attn_implementation_internal", private)


def check_attention_can_be_saved(model: torch.nn.Module) -> None:
    """Raise if no attention's output can be saved, with or without sequence parallelism."""
    names = dict.fromkeys(str(config._attn_implementation) for config in _attention_configs(model))
    if not any(map(_can_be_saved, names)):
        found = " and ".join(map(repr, names))
        raise UnsupportedModelError(
            f"alst.save_attention_output: {type(model).__name__}'s attention output cannot be saved with "
            f"attn_implementation={found}. Load the model with transformers' own attn_implementation='sdpa' or "
            "'flash_attention_2', or set the key to false."
        )


def _attention_configs(model: torch.nn.Module) -> list[Any]:
    """Return the distinct configs of the model's modules that name an attention."""
    held = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    return [config for config in held.values() if getattr(config, "_attn_implementation", None)]


def _can_be_saved(name: str) -> bool:
    """Return True for transformers' functions that run as operators whose output can be saved."""
    function = AttentionInterface._global_mapping.get(str(name))  # under sequence parallelism the name is private
    return function is sdpa_attention_forward or function is flash_attention_forward


def _caching_function(name: str, function: Callable[..., Any], calls: ForwardContext | None) -> Callable[..., Any]:
    """Wrap transformers' attention function to save its output if a frame requests it."""
    is_flash, backend = function is flash_attention_forward, find_backend(name)

    # Graph break: a frame's saved tensors stay out of compiled graphs.
    @torch.compiler.disable
    def attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if calls is not None and calls.answer_attention is not None:
            query, key, value, mask, scaling, arguments = read_call(module, *args, **kwargs)
            return calls.answer_attention(query, key, value, mask, scaling, arguments, backend), None
        # Masks of memory-lean layers, of which this is not one.
        args, kwargs = tree_map_only(MaskSpec, lambda mask: mask.dense(), (args, kwargs))
        seen = under_own_name(module, name) if is_flash else module
        frame = saving_frame(name)
        if frame is None:
            return function(seen, *args, **kwargs)
        return attend_cached(frame, lambda: function(seen, *args, **kwargs))

    return attention

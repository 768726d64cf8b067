"""Attention of a model without sequence parallelism, where its output is kept or its layers run in chunks.

The model's attention function runs unchanged, with transformers' own masks and arguments, within a frame that saves its
output, or it answers to a layer's parts; masks are described as under sequence parallelism. It is registered under a
private name in transformers' interfaces (private_config.py).
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from deepspeed_alst.attention.attention_cache import attend_cached, saving_frame
from deepspeed_alst.attention.hf_attention import find_backend, read_call
from deepspeed_alst.attention.hf_masks import MaskSpec, batch_mask
from deepspeed_alst.attention.private_config import PrivateName, own_config, under_own_name
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.validation import LABEL_KEYS, check_mask
from deepspeed_alst.errors import DataError, UnsupportedModelError


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


def register_on_one_rank(spec: ModelSpec, calls: ForwardContext, patches: PatchSet) -> str:
    """Route attention through the memory-lean interface at SP 1, and describe its masks; return why not, if so."""
    name = spec.config._attn_implementation
    if name != "sdpa":
        return f"attn_implementation='{name}' at sequence_parallel_size 1; use 'sdpa'"
    if not isinstance(name, PrivateName):  # else its outputs are kept, and it is done
        try:
            cache_attention(spec.outer, patches, calls)
        except UnsupportedModelError:
            return "the program's own function under attn_implementation='sdpa'"
    private, masks = spec.config._attn_implementation, AttentionMaskInterface._global_mapping
    if not calls.core:  # else SP's function describes them (ds_alst plan)
        patches.entry(masks, private, _describing(masks[private], calls))

    @torch.compiler.disable
    def enter(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.inside, calls.drops_padding = True, _drops_padding(kwargs)
        tokens = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
        calls.in_chunks = next(x.shape[1] for x in tokens if x is not None) >= calls.chunks_from

    patches.hook(spec.outer, "forward_pre", enter, with_kwargs=True)
    patches.hook(spec.outer, "forward", calls.leave, always_call=True)
    return ""


def _drops_padding(batch: dict[str, Any]) -> bool:
    """Return True if a batch's mask hides right padding alone, which has no labels."""
    mask = batch.get("attention_mask")
    labels = {key: batch[key] for key in LABEL_KEYS if batch.get(key) is not None}
    if not labels or not isinstance(mask, torch.Tensor):
        return False
    try:
        check_mask(mask, labels)
    except DataError:
        return False
    return True


def _describing(make: Callable[..., Any], calls: ForwardContext) -> Callable[..., Any]:
    """Wrap transformers' function that makes a mask, to describe it where it can be; ``MaskSpec.dense`` makes it."""

    @torch.compiler.disable
    def mask_function(**asked: Any) -> Any:
        dense = functools.cache(functools.partial(make, **asked))
        length, padding = asked["q_length"], asked.get("attention_mask")
        hides_padding = padding is not None and not bool((padding != 0).all())
        is_square = asked["kv_length"] == length and not asked.get("q_offset") and not asked.get("kv_offset")
        if not is_square or (hides_padding and not calls.drops_padding):
            return dense()
        try:
            mask = batch_mask(asked["mask_function"])
        except UnsupportedModelError:
            return dense()
        if mask.hides_nothing(length) and not hides_padding:
            # transformers makes one for a window of just this length.
            return None if asked.get("allow_is_causal_skip", True) else dense()
        return replace(mask, dense=dense)

    return mask_function

"""Attention and masks of a model with memory-lean layers without sequence parallelism."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AttentionMaskInterface

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.validation import LABEL_KEYS, check_mask
from deepspeed_alst.errors import DataError, UnsupportedModelError
from deepspeed_alst.offload.hf_attention_cache import cache_attention
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.hf_masks import batch_mask
from deepspeed_alst.sequence_parallel.private_config import PrivateName


def register_on_one_rank(spec: ModelSpec, calls: ForwardContext, patches: PatchSet) -> str:
    """Make attention answer to layers' parts and describe its masks, as SP does; return the reason if it cannot."""
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
    patches.hook(spec.outer, "forward", lambda *_: setattr(calls, "inside", False), always_call=True)
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

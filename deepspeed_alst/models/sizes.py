"""Sizes for counting a step's FLOPs, read from a model's config and weights."""

import contextlib
from collections import Counter
from typing import Any

import torch

from deepspeed_alst.ledger.step_flops import Span, StepSizes
from deepspeed_alst.models.checkpoints import checkpointed_layers
from deepspeed_alst.models.experts import expert_counts
from deepspeed_alst.models.linear_layers import has_attention
from deepspeed_alst.models.wrapped import base_model

_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k")


def attention_spans(model: torch.nn.Module) -> tuple[tuple[Span, int], ...]:
    """Return the attention spans of a model, bare or wrapped, each with its number of layers."""
    base = base_model(model)
    if not hasattr(base, "config") or not has_attention(base):
        return ()
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    spans = {
        "full_attention": Span(),
        "attention": Span(),
        "hybrid": Span(),
        "sliding_attention": Span(window=window),
        "chunked_attention": Span(chunk=getattr(config, "attention_chunk_size", None)),
    }
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return ((Span(window=window), config.num_hidden_layers),)
    return tuple(Counter(spans[kind] for kind in kinds if kind in spans).items())


def step_sizes(model: torch.nn.Module) -> StepSizes | None:
    """Return the current sizes of a model; None if its config does not tell the active experts or heads.

    Embedding lookups are not matrix products; the head counts for all tokens, tied or not. A weight that a forward uses
    several times counts once.
    """
    base = base_model(model)
    if not hasattr(base, "config"):
        return None
    config = base.config.get_text_config()
    spans, width = attention_spans(model), _pair_width(config)
    active = next((value for name in _ACTIVE_EXPERTS if (value := getattr(config, name, None))), None)
    weights = _weights(model, base, expert_counts(base))
    if (spans and width is None) or (active is None and any(experts > 1 for _, experts in weights.values())):
        return None
    passed = {param: numel * min(active or 1, experts) // experts for param, (numel, experts) in weights.items()}
    layers = checkpointed_layers(base)
    again = [layer for layer in layers if layer.gradient_checkpointing]
    return StepSizes(
        trained=sum(numel for param, numel in passed.items() if param.requires_grad),
        frozen=sum(numel for param, numel in passed.items() if not param.requires_grad),
        recomputed=sum(passed.get(param, 0) for param in {each for layer in again for each in layer.parameters()}),
        attention=spans,
        pair_width=width or 0,
        recomputed_attention=len(again) / max(1, len(layers)),
    )


def _weights(
    model: torch.nn.Module, base: torch.nn.Module, counts: set[int]
) -> dict[torch.nn.Parameter, tuple[int, int]]:
    """Return each matrix's elements, and how many experts share them: 1 if every token passes all of it."""
    modules = list(model.modules())
    looked_up = {module.weight for module in modules if isinstance(module, torch.nn.Embedding)}
    head = base.get_output_embeddings()
    apart = {
        param: len(each)
        for each in modules
        if isinstance(each, torch.nn.ModuleList | torch.nn.ModuleDict) and len(each) in counts and _are_alike(each)
        for param in each.parameters()
    }
    found = {}
    for module in modules:
        for name, param in module.named_parameters(recurse=False):
            shape = getattr(param, "ds_shape", param.shape)
            is_head = head is not None and param is head.weight
            if len(shape) < 2 or name.endswith("bias") or (param in looked_up and not is_head):
                continue
            stacked = len(shape) == 3 and shape[0] in counts and not isinstance(module, torch.nn.Conv1d)
            found[param] = (torch.Size(shape).numel(), shape[0] if stacked else apart.get(param, 1))
    return found


def _are_alike(experts: Any) -> bool:
    """Return True if these modules can be experts, not as many decoder layers."""
    children = list(experts.children())
    return not any(hasattr(child, "self_attn") or hasattr(child, "gradient_checkpointing") for child in children)


def _pair_width(config: Any) -> int | None:
    with contextlib.suppress(RuntimeError):  # transformers raises it where layers differ
        heads = getattr(config, "num_attention_heads", None)
        if not heads:
            return None
        of_value = getattr(config, "attention_head_dim", None) or getattr(config, "head_dim", None)
        of_value = of_value or config.hidden_size // heads
        of_query = of_value
        if getattr(config, "qk_nope_head_dim", None):  # latent attention
            of_query, of_value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        return heads * (of_query + of_value)
    return None

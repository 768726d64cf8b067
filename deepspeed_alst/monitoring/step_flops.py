"""FLOPs of a training step in closed form, from a model's config and weights, in two conventions.

A multiply-add is 2, and only matmuls count. Per token, each matrix weight costs 2 in the forward, 2 for the input
gradient, and 2 for the weight gradient if it trains. Attention costs 2 * (D_qk + D_v) per head and pair of tokens, and
twice that in the backward.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec

_ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_k")


@dataclass(frozen=True)
class Span:
    """Attention range in a document: all tokens up to itself, a window, or the chunk so far."""

    window: int | None = None
    chunk: int | None = None

    def seen(self, places: torch.Tensor) -> torch.Tensor:
        """Count the tokens, itself included, that a token at each place of its document attends to."""
        if self.chunk is not None:
            return places % self.chunk + 1
        return (places + 1).clamp(max=self.window) if self.window is not None else places + 1

    def seen_by_all(self, tokens: int) -> int:
        """Return the sum of ``seen`` over the first ``tokens`` places, in closed form."""
        if self.chunk is not None:
            count, rest = divmod(tokens, self.chunk)
            return count * self.chunk * (self.chunk + 1) // 2 + rest * (rest + 1) // 2
        width = min(tokens, tokens if self.window is None else self.window)
        return width * (width + 1) // 2 + (tokens - width) * width


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of forward and backward, by tokens and by pairs added up over all attention layers."""

    spans: tuple[tuple[Span, int], ...]  # attention ranges, each with its number of layers
    token: float  # 6 per trained weight of a token's matrices (active experts only), 4 per frozen one
    token_again: float  # recomputation: 2 per weight in checkpointed layers
    pair: float  # in one layer: 6 * heads * (D_qk + D_v)
    pair_again: float  # recomputation: a third of it, times the share of checkpointed layers

    def pairs(self, places: torch.Tensor) -> torch.Tensor:
        """Count the pairs of a token at each place of its document, over all layers."""
        return sum((layers * span.seen(places) for span, layers in self.spans), torch.zeros_like(places))

    def model(self, tokens: float, pairs: float) -> float:
        """Compute the model FLOPs, as in MFU (PaLM, arXiv 2204.02311): pairs that the mask allows, no recomputation."""
        return self.token * tokens + self.pair * pairs

    def alst(self, tokens: float, pairs: float) -> float:
        """Compute ALST's FLOPs (arXiv 2506.13996): the full square of scores, checkpointed layers' forward twice."""
        # The square has each pair twice, and a token's with itself once.
        square = 2 * pairs - sum(layers for _, layers in self.spans) * tokens
        return (self.token + self.token_again) * tokens + (self.pair + self.pair_again) * square


def step_flops(spec: ModelSpec) -> StepFlops | None:
    """Return the FLOPs of a model, bare or wrapped; None if its config lacks the active experts or heads.

    Embedding lookups do not count; the head counts for all tokens, tied or not. A shared weight counts once.
    """
    if not hasattr(spec.model, "config"):
        return None
    config, layers = spec.text_config, spec.checkpointed_layers
    spans, width, weights = _spans(config), _pair_width(config), _weights(spec, config)
    if (spans and width is None) or weights is None:
        return None
    again = [layer for layer in layers if layer.gradient_checkpointing]
    recomputed = {param for layer in again for param in layer.parameters()}
    pair = 6 * (width or 0)
    return StepFlops(
        spans,
        token=sum((6 if param.requires_grad else 4) * numel for param, numel in weights.items()),
        token_again=sum(2 * numel for param, numel in weights.items() if param in recomputed),
        pair=pair,
        pair_again=pair / 3 * len(again) / max(1, len(layers)),
    )


def _spans(config: Any) -> tuple[tuple[Span, int], ...]:
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    spans = {
        **dict.fromkeys(("full_attention", "attention", "hybrid"), Span()),
        "sliding_attention": Span(window=window),
        "chunked_attention": Span(chunk=getattr(config, "attention_chunk_size", None)),
    }
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return tuple(Counter(spans[kind] for kind in kinds if kind in spans).items())


def _pair_width(config: Any) -> int | None:
    """Return heads * (D_qk + D_v) of a layer, or None if the config lacks it."""
    try:
        heads = getattr(config, "num_attention_heads", None)
        if not heads:
            return None
        if getattr(config, "qk_nope_head_dim", None):  # latent attention
            return heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        size = getattr(config, "attention_head_dim", None) or getattr(config, "head_dim", None)
        return 2 * heads * (size or config.hidden_size // heads)
    except RuntimeError:  # transformers raises it where layers differ
        return None


def _weights(spec: ModelSpec, config: Any) -> dict[torch.nn.Parameter, int] | None:
    """Return each matrix's elements that a token uses; None if the number of active experts is unknown."""
    counts, base = spec.expert_counts, spec.model
    apart = {param: len(each) for _, each in spec.separate_experts() for param in each.parameters()}
    active = next((value for name in _ACTIVE_EXPERTS if (value := getattr(config, name, None))), None)
    looked_up = {module.weight for module in base.modules() if isinstance(module, torch.nn.Embedding)}
    looked_up.discard(getattr(spec.head, "weight", None))
    passed = {}
    for name, param in base.named_parameters():
        shape = torch.Size(getattr(param, "ds_shape", param.shape))
        if len(shape) < 2 or name.endswith("bias") or param in looked_up:
            continue
        stacked = len(shape) == 3 and shape[0] in counts and "conv" not in name
        experts = shape[0] if stacked else apart.get(param, 1)
        if experts > 1 and active is None:
            return None
        passed[param] = shape.numel() * min(active or 1, experts) // experts
    return passed

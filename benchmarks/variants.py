"""Variants of a cell's model: with a LoRA adapter, partly frozen, or compiled; identical in every run."""

import math
from typing import Any

import torch

_RANK = 4
_LORA_SEED = 11
# Spread of A and B: large enough for visible gradients, small enough for three large steps to stay stable.
_LORA_SPREAD = {"lora_A": 0.25, "lora_B": 0.15}

FROZEN = {
    "embedding": lambda name: "embed_tokens" in name,
    "layer 0": lambda name: "layers.0." in name or "embed_tokens" in name,
    "all but lm_head": lambda name: "lm_head" not in name,
    "all but norms": lambda name: "norm" not in name,
    "layer 1": lambda name: "layers.1." in name,
}
"""Predicates for names of frozen parameters, by the name of a cell's level."""


def vary(model: torch.nn.Module, lora: bool = False, frozen: str = "") -> torch.nn.Module:
    """Add an adapter to a model, or freeze a part of it.

    The adapter is LoRA on every linear layer of attention and MLP. Its B is not zero, unlike at the start of a
    training: A's gradients would be zero too, with nothing to compare.
    """
    if frozen:
        for name, param in model.named_parameters():
            param.requires_grad_(not FROZEN[frozen](name))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=_RANK, lora_alpha=4 * _RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    make = torch.Generator().manual_seed(_LORA_SEED)
    with torch.no_grad():
        for name, param in trained(model).items():
            spread = next(value for part, value in _LORA_SPREAD.items() if part in name)
            param.copy_(torch.randn(param.shape, generator=make) * spread / math.sqrt(param.shape[-1]))
    return model


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters, by names that compilation does not change."""
    return {name.replace("_orig_mod.", ""): param for name, param in model.named_parameters() if param.requires_grad}

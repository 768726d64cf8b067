"""Models for a trial of a ds_config: a user's own one, or a small one of its kind, from a config file."""

import math
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from deepspeed_alst.errors import ConfigError
from deepspeed_alst.models.dropout import without_dropout
from deepspeed_alst.models.shrink import shrink


def load_config(model: str, small: bool) -> Any:
    """The config of a model, without a cache and without dropout.

    Args:
        model: a config.json, a folder that has one, or a name on the hub.
        small: shrink it (``shrink.py``).

    Raises:
        ConfigError: there is none, or transformers does not know its ``model_type``.
    """
    if model.endswith(".json") and not os.path.exists(model):  # no name on the hub, where transformers would look
        raise ConfigError(f"--model {model}: there is no such file")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {model}: no config that transformers can read: {error}") from error
    config = shrink(config.get_text_config()) if small else config
    config.use_cache = False
    return without_dropout(config)


def build(config: Any, weights: str | None, ds_config: dict[str, Any], core: str, half: str = "") -> PreTrainedModel:
    """A causal language model for a run; the same weights on every rank and in every run.

    Args:
        config: of transformers.
        weights: a folder or name to load them from; random ones, in fp32, where it is None.
        ds_config: under ZeRO 3 the weights are sharded as they are loaded.
        core: the attention implementation.
        half: bf16 or fp16, which the weights are rounded to in any case.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "": torch.float32}[half]
    if weights is not None:
        # transformers asks for it as long as it lives.
        sharding = (
            HfDeepSpeedConfig(ds_config) if (ds_config.get("zero_optimization") or {}).get("stage") == 3 else None
        )
        model = AutoModelForCausalLM.from_pretrained(weights, config=config, dtype=dtype, attn_implementation=core)
        del sharding
        return model.train()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=core)
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() > 1:
                param.normal_(0.0, 1.0 / math.sqrt(param.shape[-1]))  # enough spread for lively gradients
            param.copy_(param.to(dtype))
    return model.train()


def causal_lm(config: Any) -> PreTrainedModel:
    """A model in bf16 with sdpa, on whatever device is the default; its weights are as transformers makes them."""
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def has_weights(model: str) -> bool:
    """Whether a path is a folder with weights."""
    return os.path.isdir(model) and any(name.endswith((".safetensors", ".bin")) for name in os.listdir(model))

"""Models for a trial of a ds_config, from a config file: the user's own, or a tiny one of its kind."""

import math
import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from deepspeed_alst.errors import ConfigError
from deepspeed_alst.random_draws.model_draws import without_dropout
from deepspeed_alst.verification.hf_tiny_config import shrink


def load_config(model: str, small: bool) -> Any:
    """Load a model's config, without a cache and without dropout.

    Args:
        model: a config.json, a folder that has one, or a name on the hub.
        small: if True, shrink it (``shrink.py``).

    Raises:
        ConfigError: there is no config, or transformers does not know its ``model_type``.
    """
    if model.endswith(".json") and not os.path.exists(model):  # not a hub name, which transformers would look up
        raise ConfigError(f"--model {model}: there is no such file")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--model {model}: no config that transformers can read: {error}") from error
    config = shrink(config.get_text_config()) if small else config
    config.use_cache = False
    return without_dropout(config)


def build(config: Any, weights: str | None, ds_config: dict[str, Any], core: str, half: str = "") -> PreTrainedModel:
    """Build a causal LM for a run, with the same weights on every rank and in every run.

    Args:
        config: config of transformers.
        weights: folder or hub name to load weights from; None for random ones in fp32.
        ds_config: under ZeRO-3 the weights are partitioned as they are loaded.
        core: attention implementation.
        half: bf16 or fp16, to which the weights are rounded in any case.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "": torch.float32}[half]
    if weights is not None:
        # transformers partitions weights while this object is alive.
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
                param.normal_(0.0, 1.0 / math.sqrt(param.shape[-1]))  # large enough for sizable gradients
            param.copy_(param.to(dtype))
    return model.train()


def causal_lm(config: Any) -> PreTrainedModel:
    """Build a bf16 model with sdpa on the default device, with transformers' initial weights."""
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")


def has_weights(model: str) -> bool:
    """Return True if a path is a folder with weights."""
    return os.path.isdir(model) and any(name.endswith((".safetensors", ".bin")) for name in os.listdir(model))

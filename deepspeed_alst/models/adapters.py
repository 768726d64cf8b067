"""Which of PEFT's adapters are verified under sequence parallelism, and why any other is refused.

An adapter is in the table when a test trains it at SP 2 and finds the loss and every gradient of SP 1. Adapters that
work on each token by itself are; those that look at the sequence, add tokens to it or change attention are not.
"""

from typing import Any

import torch

from deepspeed_alst.models.wrapped import base_model

VERIFIED_ADAPTERS = (
    "LORA",
    "IA3",
    "LOHA",
    "LOKR",
    "VERA",
    "OFT",
    "HRA",
    "HIRA",
    "MISS",
    "RANDLORA",
    "ROAD",
    "C3A",
    "SHIRA",
    "VBLORA",
    "LN_TUNING",
    "TRAINABLE_TOKENS",
)
"""``peft_type`` of the verified adapters."""

# Kinds of LoRA that do more than add a product of two matrices to a linear layer, which no test trains.
_UNVERIFIED_OPTIONS = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


def adapter_problems(model: torch.nn.Module) -> list[str]:
    """Why the adapters of a model cannot be trained under sequence parallelism; empty if they can, or there are none.

    Adapters count whether they are active or not: a program may switch between them.
    """
    return [
        f"adapter '{name}': {problem}"
        for name, config in _adapter_configs(model).items()
        for problem in _problems(config)
    ]


def _adapter_configs(model: torch.nn.Module) -> dict[str, Any]:
    """By name; PEFT's wrapper has them, and so has a model into which they were put without a wrapper."""
    configs = getattr(model, "peft_config", None) or getattr(base_model(model), "peft_config", None)
    return configs if isinstance(configs, dict) else {}


def _problems(config: Any) -> list[str]:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        return [
            f"peft_type='{kind}' puts virtual tokens before the sequence, of which a rank sees its shard only; use LoRA"
        ]
    if kind not in VERIFIED_ADAPTERS:
        return [
            f"peft_type='{kind}' is not verified under sequence parallelism; verified are: "
            f"{', '.join(VERIFIED_ADAPTERS)}"
        ]
    return [
        f"{option} is not verified under sequence parallelism; leave it out"
        for option in _UNVERIFIED_OPTIONS
        if getattr(config, option, None)
    ]

"""Which of PEFT's adapters are refused under sequence parallelism by their config.

Every adapter's forward is compared whole against split on the live model (model_check.py). Refused here is what that
comparison cannot see, or would refuse in other words.
"""

from typing import Any

import torch

from deepspeed_alst.models.wrapped import base_model

_REFUSED_KINDS = {
    "ADALORA": "moves ranks between weights by the gradients of this rank's shard",
}
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "looks for tokens in the sequence, of which a rank has its shard only",
    "monteclora_config": "keeps random weights that ranks would draw apart",
    "velora_config": "changes the backward, which is not verified",
}


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
    if kind in _REFUSED_KINDS:
        return [f"peft_type='{kind}' {_REFUSED_KINDS[kind]}; use LoRA"]
    return [
        f"{option} {why}; leave it out" for option, why in _REFUSED_OPTIONS.items() if getattr(config, option, None)
    ]

"""Reject PEFT adapters that cannot run under sequence parallelism, by their config.

model_check.py compares each adapter's forward unsharded and sharded on the live model. The adapters rejected here have
defects that this comparison cannot see, or would report less clearly.
"""

from typing import Any

import torch

from deepspeed_alst.core.unwrap import base_model

_REFUSED_KINDS = {
    "ADALORA": "moves ranks between weights by the gradients of this rank's shard",
}
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "looks for tokens in the sequence, of which a rank has its shard only",
    "monteclora_config": "keeps random weights that ranks would draw apart",
    "velora_config": "changes the backward, which is not verified",
}


def adapter_problems(model: torch.nn.Module) -> list[str]:
    """Return the reasons why a model's adapters cannot train under sequence parallelism; may be empty.

    Inactive adapters are checked too, because user code may activate them later.
    """
    return [
        f"adapter '{name}': {problem}"
        for name, config in _adapter_configs(model).items()
        for problem in _problems(config)
    ]


def _adapter_configs(model: torch.nn.Module) -> dict[str, Any]:
    """Return the adapter configs by name, from PEFT's wrapper or from a model with injected adapters."""
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

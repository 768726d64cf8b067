"""Which models are verified under sequence parallelism, and why any other is refused.

A family is in the table when a test trains a small model of it at SP 2 and finds the loss and every gradient of SP 1.
What a config adds to a family (a window, a RoPE that depends on the length, dropout, ...) is refused by name.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepspeed_alst.config import nearest
from deepspeed_alst.errors import UnsupportedModelError

VERIFIED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi3",
    "olmo",
    "olmo2",
    "granite",
    "cohere",
    "glm",
    "glm4",
    "helium",
    "starcoder2",
    "smollm3",
    "stablelm",
    "nemotron",
    "mixtral",
    "qwen3_moe",
    "olmoe",
)
"""``model_type`` of the verified families."""

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelFacts:
    """What sequence parallelism needs to know of a model before the first step."""

    model_type: str
    num_heads: int
    num_kv_heads: int


def check_model(model: torch.nn.Module) -> ModelFacts:
    """Read the facts of a model, and refuse what is not verified.

    Raises:
        UnsupportedModelError: one line for each reason: what in the config or the model, its value, the way out.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model: sequence parallelism needs a PreTrainedModel, whose "
            "attention and loss it can reach. Wrappers (PEFT, torch.compile, your own) are not yet available."
        )
    config = model.config
    text_config = config.get_text_config()
    problems = [*_config_problems(config, text_config), *_module_problems(model)]
    if problems:
        raise UnsupportedModelError("\n".join(f"{type(model).__name__}: {problem}." for problem in problems))
    num_heads = text_config.num_attention_heads
    return ModelFacts(config.model_type, num_heads, getattr(text_config, "num_key_value_heads", None) or num_heads)


def _config_problems(config: Any, text_config: Any) -> list[str]:
    problems = []
    if config.model_type not in VERIFIED:
        problems.append(
            f"model_type='{config.model_type}' is not verified under sequence parallelism."
            f"{nearest(config.model_type, VERIFIED)} Verified are: {', '.join(VERIFIED)}"
        )
    core = config._attn_implementation
    if core != "sdpa":
        problems.append(
            f"attn_implementation='{core}' is not available under sequence parallelism; load the model with "
            "attn_implementation='sdpa'"
        )
    window = getattr(text_config, "sliding_window", None)
    if window is not None and getattr(text_config, "use_sliding_window", True):
        problems.append(f"sliding_window={window}: windows are not yet available; set it to None if the model allows")
    other_layers = sorted(set(getattr(text_config, "layer_types", None) or ()) - {"full_attention"})
    if other_layers:
        problems.append(f"layer_types has {', '.join(other_layers)}: only full_attention layers are verified")
    for name in _rope_types(text_config):
        if name in _LENGTH_DEPENDENT_ROPE:
            problems.append(f"rope_type='{name}' depends on the sequence's length, of which a rank sees its shard only")
    for name in sorted(vars(text_config)):
        value = getattr(text_config, name, None)
        if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, int | float) and value > 0:
            problems.append(f"{name}={value}: ranks cannot draw the dropout of the whole sequence; set it to 0")
    if getattr(text_config, "output_router_logits", False):
        problems.append("output_router_logits=True: the router's auxiliary loss is not yet available; set it to False")
    if not getattr(text_config, "is_causal", True):
        problems.append("is_causal=False: only causal attention is verified")
    return problems


def _module_problems(model: torch.nn.Module) -> list[str]:
    names = {cls.__name__ for cls in type(model).__mro__}
    if not names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return [
            "only causal language models (AutoModelForCausalLM) are verified: other heads take a shard for the whole"
        ]
    dropouts = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    if dropouts:
        return [
            f"{dropouts[0]} is a Dropout with p > 0: ranks cannot draw the dropout of the whole sequence; set p to 0"
        ]
    return []


def _rope_types(text_config: Any) -> set[str]:
    """The rope types of a config, of which newer models have one per layer type."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    found = {parameters.get("rope_type", "default")}
    found |= {value.get("rope_type", "default") for value in parameters.values() if isinstance(value, dict)}
    return found

"""Which models are verified under sequence parallelism, and why any other is refused.

A family is in the table when a test trains a small model of it at SP 2 and finds the loss and every gradient of SP 1.
What a config adds to a family (a window, a RoPE that depends on the length, dropout, ...) is refused by name.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepspeed_alst.config import nearest
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.models.adapters import adapter_problems
from deepspeed_alst.models.cores import find_core
from deepspeed_alst.models.linear_layers import available_layer_types, has_attention, linear_heads, linear_problems
from deepspeed_alst.models.names import PrivateName
from deepspeed_alst.models.wrapped import base_model

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
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "granitemoehybrid",
    "bamba",
    "falcon_h1",
    "nemotron_h",
    "zamba2",
    "mamba2",
    "olmo_hybrid",
    "kimi_linear",
    "jamba",
    "mamba",
    "falcon_mamba",
    "zamba",
)
"""``model_type`` of the verified families."""

# Of cores that people ask for and that are not available.
_WHY_NOT = {
    "eager": " (it makes a score of every pair of tokens)",
    "paged|eager": " (it is made for generation)",
}
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelFacts:
    """What sequence parallelism needs to know of a model before the first step."""

    model_type: str
    num_heads: int
    """Of attention; 0 where there is none."""
    num_kv_heads: int
    linear_heads: frozenset[tuple[int, int]] = frozenset()
    """Of its layers without attention: heads, or channels, of a scan, and how many of their keys or B and C."""


def check_model(model: torch.nn.Module) -> ModelFacts:
    """Read the facts of a model, inside PEFT's or torch.compile's wrapper or bare, and refuse what is not verified.

    Raises:
        UnsupportedModelError: one line for each reason: what in the config or the model, its value, the way out.
    """
    base = base_model(model)
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(base).__name__} is not a transformers model: sequence parallelism needs a PreTrainedModel, whose "
            "attention and loss it can reach, bare or in the wrapper of PEFT or torch.compile; other wrappers are not "
            "available."
        )
    config = base.config
    text_config = config.get_text_config()
    problems = [*_config_problems(base, text_config), *_module_problems(base), *_other_configs(base)]
    problems += [*_loss_problems(base), *linear_problems(base), *adapter_problems(model)]
    if problems:
        raise UnsupportedModelError("\n".join(f"{type(base).__name__}: {problem}." for problem in problems))
    num_heads = text_config.num_attention_heads if has_attention(base) else 0
    num_kv_heads = getattr(text_config, "num_key_value_heads", None) or num_heads
    return ModelFacts(config.model_type, num_heads, num_kv_heads, frozenset(linear_heads(base)))


def _config_problems(model: PreTrainedModel, text_config: Any) -> list[str]:
    config, problems = model.config, []
    if config.model_type not in VERIFIED:
        problems.append(
            f"model_type='{config.model_type}' is not verified under sequence parallelism."
            f"{nearest(config.model_type, VERIFIED)} Verified are: {', '.join(VERIFIED)}"
        )
    if has_attention(model):
        problems += _core_problems(config._attn_implementation)
    problems += _window_problems(model, text_config)
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


def _core_problems(name: str) -> list[str]:
    if isinstance(name, PrivateName):
        return ["it has an engine with sequence parallelism already; destroy() that one, or build a second model"]
    if find_core(name) is None:
        return [
            f"attn_implementation='{name}' is not available under sequence parallelism{_WHY_NOT.get(name, '')}; load "
            "the model with attn_implementation='sdpa', 'flash_attention_2' (or 3, 4, or a flash kernel of the hub) or "
            "'flex_attention'"
        ]
    return []


def _window_problems(model: PreTrainedModel, text_config: Any) -> list[str]:
    name = model.config._attn_implementation
    core = find_core(name)
    has_windows = core is not None and core.has_windows
    available = {"full_attention", "sliding_attention"} if has_windows else {"full_attention"}
    available |= available_layer_types(model, getattr(text_config, "layer_types", None))
    can = f"not with attn_implementation='{name}' under sequence parallelism"
    problems = []
    window = getattr(text_config, "sliding_window", None)
    if window is not None and getattr(text_config, "use_sliding_window", True) and not has_windows:
        problems.append(
            f"sliding_window={window}: {can}; flash_attention_2 can do it, or set it to None if the model allows"
        )
    other_layers = sorted(set(getattr(text_config, "layer_types", None) or ()) - available)
    if "sliding_attention" in other_layers:
        problems.append(f"layer_types has sliding_attention: {can}; flash_attention_2 can do it")
    if unknown := [each for each in other_layers if each != "sliding_attention"]:
        problems.append(f"layer_types has {', '.join(unknown)}: how such layers could be split over ranks is not known")
    return problems


def _module_problems(model: torch.nn.Module) -> list[str]:
    names = {cls.__name__ for cls in type(model).__mro__}
    if not names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return [
            "only causal language models (AutoModelForCausalLM) are verified: other heads take a shard for the whole"
        ]
    # An adapter's dropouts, in dicts such as lora_dropout, are refused by the adapter's name.
    dropouts = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Dropout) and module.p > 0 and "_dropout." not in name
    ]
    if dropouts:
        return [
            f"{dropouts[0]} is a Dropout with p > 0: ranks cannot draw the dropout of the whole sequence; set p to 0"
        ]
    return []


def _loss_problems(model: torch.nn.Module) -> list[str]:
    """A loss of the program's own, which would be given a shard's logits."""
    if model.loss_function is ForCausalLMLoss:
        return []
    name = getattr(model.loss_function, "__qualname__", type(model.loss_function).__name__)
    return [
        f"loss_function is {name}, not transformers' ForCausalLMLoss: it would make the loss of a shard; leave the "
        "model its own, and change outputs.loss, which is the whole sequence's"
    ]


def _other_configs(model: torch.nn.Module) -> list[str]:
    """Modules that would not hear of the change of attention: a layer that was deep-copied has a config of its own."""
    for name, module in model.named_modules():
        own = vars(module).get("config")
        if isinstance(own, PreTrainedConfig) and own is not model.config:
            return [f"{name} has a config of its own, not the model's; set it to the model's: {name}.config = config"]
    return []


def _rope_types(text_config: Any) -> set[str]:
    """The rope types of a config, of which newer models have one per layer type."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    found = {parameters.get("rope_type", "default")}
    found |= {value.get("rope_type", "default") for value in parameters.values() if isinstance(value, dict)}
    return found

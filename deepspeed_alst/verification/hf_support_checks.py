"""Reject models and configs that sequence parallelism does not support, with the reasons.

The census (verified.py) or a tiny model of the same kind (probe.py) verifies all others.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.integrations.hf_upstream import is_causal_lm_loss
from deepspeed_alst.integrations.peft import adapter_problems
from deepspeed_alst.linear_attention.layers import available_layer_types, has_attention, linear_heads, linear_problems
from deepspeed_alst.sequence_parallel.hf_backends import find_backend
from deepspeed_alst.sequence_parallel.private_config import PrivateName
from deepspeed_alst.verification.program_code import is_programs

# Support flags of a transformers class, and the attn_implementation to suggest.
_CORES = (
    ("_supports_sdpa", "'sdpa'"),
    ("_supports_flash_attn", "'flash_attention_2' (or 3, 4, or a flash kernel of the hub)"),
    ("_supports_flex_attn", "'flex_attention'"),
)
_WHY_NOT = {
    "eager": " (it makes a score of every pair of tokens)",
    "paged|eager": " (it is made for generation)",
}
# Supported attention layer types by their transformers names; flash attention has no chunks.
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class ModelFacts:
    """Model facts that sequence parallelism needs before the first step."""

    model_type: str
    num_heads: int | None
    """Query heads; None without attention or if layers differ, which are then checked when they attend."""
    num_kv_heads: int | None
    linear_heads: frozenset[tuple[int, int]] = frozenset()
    """For layers without attention: heads, or channels, of a scan, and the number of its keys or B and C."""


def check_model(model: torch.nn.Module) -> ModelFacts:
    """Return the facts of a model, bare or in PEFT's or torch.compile's wrapper; raise if unsupported.

    Raises:
        UnsupportedModelError: one line per reason: the config key or module, its value, the fix.
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
    problems += [
        *_loss_problems(base),
        *_router_problems(base, text_config),
        *linear_problems(base),
        *adapter_problems(model),
    ]
    if problems:
        raise UnsupportedModelError("\n".join(f"{type(base).__name__}: {problem}." for problem in problems))
    num_heads, num_kv_heads = (
        _of_all_layers(text_config, f"num_{which}_heads") for which in ("attention", "key_value")
    )
    num_heads = num_heads if has_attention(base) else None
    return ModelFacts(config.model_type, num_heads, num_kv_heads or num_heads, frozenset(linear_heads(base)))


def _of_all_layers(text_config: Any, name: str) -> int | None:
    """Return an integer that all layers share; None if each has its own, for which transformers raises."""
    try:
        value = getattr(text_config, name, None)
    except RuntimeError:
        return None
    return value if isinstance(value, int) else None


def _config_problems(model: PreTrainedModel, text_config: Any) -> list[str]:
    problems = []
    if has_attention(model):
        problems += _core_problems(model)
    problems += _layer_problems(model, text_config)
    if not getattr(text_config, "is_causal", True):
        problems.append("is_causal=False: only causal attention is verified")
    return problems


def _core_problems(model: PreTrainedModel) -> list[str]:
    name = model.config._attn_implementation
    if isinstance(name, PrivateName):
        return ["it has an engine with sequence parallelism already; destroy() that one, or build a second model"]
    if is_programs(AttentionMaskInterface._global_mapping.get(name)):
        return [
            f"a function of the program's own makes the masks of attn_implementation='{name}' "
            "(AttentionMaskInterface): it would be asked for a shard's; leave transformers' there"
        ]
    if find_backend(name) is not None:
        return []
    cores = [words for flag, words in _CORES if getattr(model, flag, False)]
    if not cores:
        return [
            f"transformers has neither sdpa nor flash nor flex attention for it (attn_implementation='{name}'), and "
            "how its own layers could be split over ranks is not known: it cannot run under sequence parallelism; use "
            "another model"
        ]
    return [
        f"attn_implementation='{name}' is not available under sequence parallelism{_WHY_NOT.get(name, '')}; load the "
        f"model with attn_implementation={' or '.join(cores)}"
    ]


def _layer_problems(model: PreTrainedModel, text_config: Any) -> list[str]:
    """Return the problems of layer types that cannot be sharded or that the core does not support."""
    name, layer_types = model.config._attn_implementation, getattr(text_config, "layer_types", None)
    core = find_backend(name)
    others = set(layer_types or ()) - set(_LAYER_TYPES) - available_layer_types(model, layer_types)
    problems = []
    if others:
        problems.append(
            f"layer_types has {', '.join(sorted(others))}: how such layers could be split over ranks is not known"
        )
    if "chunked_attention" in (layer_types or ()) and core is not None and not core.uses_mask:
        problems.append(
            f"layer_types has chunked_attention: not with attn_implementation='{name}' under sequence parallelism; "
            "sdpa can do it"
        )
    return problems


def _module_problems(model: torch.nn.Module) -> list[str]:
    names = {cls.__name__ for cls in type(model).__mro__}
    if not names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        return [
            "only causal language models (AutoModelForCausalLM) are verified: other heads take a shard for the whole"
        ]
    return _position_problems(model) if has_attention(model) else []


def _position_problems(model: torch.nn.Module) -> list[str]:
    """Return the problem of a model that counts positions itself: they would restart in each shard."""
    # A subclass may only pass its arguments on.
    forwards = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    if not any("position_ids" in inspect.signature(forward).parameters for forward in forwards):
        return ["it takes no position_ids: it counts the positions of a shard from 0; use another model"]
    for name, module in model.named_modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return [
                f"{name} counts positions from behind the padding token's id, where the loader's start at 0; use "
                "another model"
            ]
    return []


def _loss_problems(model: torch.nn.Module) -> list[str]:
    """Return the problem of a user-defined loss, which would get a shard's logits."""
    if is_causal_lm_loss(model.loss_function):
        return []
    name = getattr(model.loss_function, "__qualname__", type(model.loss_function).__name__)
    return [
        f"loss_function is {name}, not transformers' ForCausalLMLoss: it would make the loss of a shard; leave the "
        "model its own, and change outputs.loss, which is the whole sequence's"
    ]


def _router_problems(model: torch.nn.Module, text_config: Any) -> list[str]:
    if not getattr(text_config, "output_router_logits", False):
        return []
    from deepspeed_alst.moe.router_loss import unknown_router_loss

    problem = unknown_router_loss(model)
    return [] if problem is None else [problem]


def _other_configs(model: torch.nn.Module) -> list[str]:
    """Return the problem of a module with its own config: an image or text submodel, or a deep-copied layer."""
    for name, module in model.named_modules():
        own = vars(module).get("config")
        if not isinstance(own, PreTrainedConfig) or own is model.config or _is_rotary(module):
            continue
        if type(own) is type(model.config):
            return [f"{name} has a config of its own, not the model's; set it to the model's: {name}.config = config"]
        # Suggest transformers' causal language model of the text config, if there is one.
        alone = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text := model.config.get_text_config()), None)
        way_out = "use another model"
        if alone is not None and text is not model.config:
            alone = alone[0] if isinstance(alone, tuple) else alone
            way_out = f"train its language model alone, {alone.__name__} of config.get_text_config()"
        return [f"{name} is a part with a {type(own).__name__}: only models of text alone are verified; {way_out}"]
    return []


def _is_rotary(module: torch.nn.Module) -> bool:
    """Return True for a rotary embedding, which reads frequencies from its config, not an attention."""
    return any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))

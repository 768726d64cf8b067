"""Reject models, configs and adapters that sequence parallelism does not support, with the reasons.

The census or a tiny model of the same kind verifies all others, and the check of the live model compares its forward.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from deepspeed_alst.attention.head_plan import attention_heads
from deepspeed_alst.attention.hf_attention import find_backend
from deepspeed_alst.attention.private_config import PrivateName
from deepspeed_alst.core.hf_model_spec import ModelSpec, is_causal_lm_loss, is_peft
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.linear_attention.layers import (
    available_layer_types,
    has_attention,
    linear_heads,
    unsupported_linear_layers,
)
from deepspeed_alst.verification.program_code import is_user_defined
from deepspeed_alst.verification.verify_model import VERIFIED_MODEL_TYPES

# Support flags of a transformers class, and the attn_implementation to suggest.
_CORES = (
    ("_supports_sdpa", "'sdpa'"),
    ("_supports_flash_attn", "'flash_attention_2' (or 3, 4, or a flash kernel of the hub)"),
    ("_supports_flex_attn", "'flex_attention'"),
)
_WHY_NOT = {
    "eager": " (its score matrix is quadratic in the sequence)",
    "paged|eager": " (it is for generation)",
}
# Supported attention layer types by their transformers names; flash attention has no chunks.
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
# Options of PEFT's adapters whose defects no comparison of forwards sees, or would report less clearly.
_ADAPTER_OPTIONS = {
    "alora_invocation_tokens": "searches the whole sequence for tokens, and a rank has a shard",
    "monteclora_config": "draws random weights, which would differ between ranks",
    "velora_config": "changes the backward, which is not verified",
}
# Adapters whose virtual tokens are embeddings that the model is given, whose calls are split.
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")


def check_model(spec: ModelSpec) -> list[tuple[int, int, str]]:
    """Return the heads that ranks share; raise if the model is unsupported.

    Returns:
        For "attention" its query and key heads, if all layers have the same (else they are checked when they attend),
        and for each "scan" of layers without attention its heads, or channels, and the number of its keys or B and C.

    Raises:
        UnsupportedModelError: one line per reason: the config key or module, its value, the fix.
    """
    base = spec.model
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(
            f"{spec.name} is not a transformers model: sequence parallelism needs a PreTrainedModel, whose "
            "attention and loss it can reach: bare, in the wrapper of PEFT or torch.compile, or as the only one in a "
            "module of the program's own."
        )
    text_config = spec.text_config
    problems = [*_config_problems(base, text_config), *_class_problems(spec), *_other_configs(base)]
    problems += [*_loss_problems(spec), *unsupported_linear_layers(base), *_adapter_problems(spec)]
    if problems:
        raise UnsupportedModelError("\n".join(f"{spec.name}: {problem}." for problem in problems))
    heads = [(*each, "scan") for each in sorted(linear_heads(base))]
    of_attention = attention_heads(text_config) if has_attention(base) else None
    return [(*of_attention, "attention"), *heads] if of_attention else heads


def _config_problems(model: PreTrainedModel, text_config: Any) -> Iterator[str]:
    name, layer_types = model.config._attn_implementation, getattr(text_config, "layer_types", None) or ()
    core = find_backend(name)
    if has_attention(model):
        yield from _core_problems(model, name)
    if others := set(layer_types) - set(_LAYER_TYPES) - available_layer_types(model, layer_types):
        yield f"layer_types has {', '.join(sorted(others))}: how such layers could be split over ranks is not known"
    if "chunked_attention" in layer_types and core is not None and not core.uses_mask:
        yield (
            f"layer_types has chunked_attention: not with attn_implementation='{name}' under sequence parallelism; "
            "sdpa can do it"
        )
    if not getattr(text_config, "is_causal", True):
        yield "is_causal=False: only causal attention is verified"


def _core_problems(model: PreTrainedModel, name: Any) -> Iterator[str]:
    cores = [words for flag, words in _CORES if getattr(model, flag, False)]
    if isinstance(name, PrivateName):
        yield "an engine with sequence parallelism owns it already; call destroy() on that one, or build a second model"
    elif is_user_defined(AttentionMaskInterface._global_mapping.get(name)):
        yield (
            f"the program has registered its own mask function for attn_implementation='{name}' "
            "(AttentionMaskInterface), which would get a shard; restore transformers'"
        )
    elif find_backend(name) is None and not cores:
        yield (
            f"transformers has neither sdpa nor flash nor flex attention for it (attn_implementation='{name}'), and "
            "how its own layers could be split over ranks is not known: it cannot run under sequence parallelism; use "
            "another model"
        )
    elif find_backend(name) is None:
        yield (
            f"attn_implementation='{name}' is not available under sequence parallelism{_WHY_NOT.get(name, '')}; load "
            f"the model with attn_implementation={' or '.join(cores)}"
        )


def _class_problems(spec: ModelSpec) -> Iterator[str]:
    """Yield the problems of another head, or of a model that counts positions itself, from 0 in each shard."""
    model = spec.model
    if spec.is_multimodal:
        from deepspeed_alst.multimodal.hf_families import family_problems

        yield from family_problems(spec)
    elif not spec.is_causal_lm and not (spec.is_decoder and model.config.model_type in VERIFIED_MODEL_TYPES):
        yield (
            "only causal language models (AutoModelForCausalLM), and the decoders, sequence and token classifiers of "
            "the same families are verified: any other head would see only its shard of the hidden states"
        )
        return
    if not has_attention(model):
        return
    # A subclass may only pass its arguments on.
    forwards = [vars(cls)["forward"] for cls in type(model).__mro__ if "forward" in vars(cls)]
    if not any("position_ids" in inspect.signature(forward).parameters for forward in forwards):
        yield "it takes no position_ids: it counts the positions of a shard from 0; use another model"
        return
    counting = (name for name, each in model.named_modules() if hasattr(each, "create_position_ids_from_input_ids"))
    if (name := next(counting, None)) is not None:
        yield (
            f"{name} counts positions from behind the padding token's id, where the loader's start at 0; use another "
            "model"
        )


def _loss_problems(spec: ModelSpec) -> Iterator[str]:
    """Yield the problems of a user-defined loss, which would get a shard's logits, and of an unknown router loss."""
    loss_function = spec.model.loss_function
    if spec.is_causal_lm and not is_causal_lm_loss(loss_function):
        name = getattr(loss_function, "__qualname__", type(loss_function).__name__)
        yield (
            f"loss_function is {name}, not transformers' ForCausalLMLoss: it would compute the loss of a shard; "
            "restore the model's own, and change outputs.loss, which is the whole sequence's"
        )
    if getattr(spec.text_config, "output_router_logits", False):
        from deepspeed_alst.moe.mixtures import unknown_router_loss

        problem = unknown_router_loss(spec)
        yield from [] if problem is None else [problem]


def _other_configs(model: torch.nn.Module) -> Iterator[str]:
    """Yield the problem of a module with its own config: an image or text submodel, or a deep-copied layer."""
    for name, module in model.named_modules():
        own = vars(module).get("config")
        # A rotary embedding reads frequencies from its config, not an attention.
        is_rotary = any(buffer.endswith("inv_freq") for buffer, _ in module.named_buffers(recurse=False))
        if not isinstance(own, PreTrainedConfig) or own is model.config or is_rotary:
            continue
        if type(own) is type(model.config):
            yield f"{name} has a config of its own, not the model's; set it to the model's: {name}.config = config"
            return
        # Suggest transformers' causal language model of the text config, if there is one.
        alone = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text := model.config.get_text_config()), None)
        way_out = "use another model"
        if alone is not None and text is not model.config:
            alone = alone[0] if isinstance(alone, tuple) else alone
            way_out = f"train its language model alone, {alone.__name__} of config.get_text_config()"
        yield f"{name} is a part with a {type(own).__name__}: only models of text alone are verified; {way_out}"
        return


def _adapter_problems(spec: ModelSpec) -> Iterator[str]:
    """Yield the problems of adapters, in PEFT's wrapper or injected; inactive ones may be activated later."""
    configs = getattr(spec.whole, "peft_config", None) or getattr(spec.model, "peft_config", None)
    for name, config in (configs if isinstance(configs, dict) else {}).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning and (is_peft(spec.outer) or kind not in _PROMPTS):
            problems = [f"peft_type='{kind}' puts virtual tokens before the sequence, and a rank has a shard; use LoRA"]
        elif kind == "ADALORA":
            problems = [f"peft_type='{kind}' reallocates LoRA ranks by the gradients of a shard; use LoRA"]
        else:
            options = [each for each in _ADAPTER_OPTIONS if getattr(config, each, None)]
            problems = [f"{each} {_ADAPTER_OPTIONS[each]}; remove it" for each in options]
        yield from (f"adapter '{name}': {each}" for each in problems)

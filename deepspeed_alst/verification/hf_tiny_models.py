"""Tiny configs of the same kind as a given one, and models for a trial of a family or of a ds_config.

Sizes are recognized by transformers' names for them; other fields keep their values, so switches and scales carry over.
Windows, chunks and the original length of a RoPE become short, so that a short sequence exceeds them.
"""

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from deepspeed_alst.attention.hf_attention import TRIAL
from deepspeed_alst.config.config_file import check_model_file
from deepspeed_alst.errors import ConfigError, UnsupportedModelError
from deepspeed_alst.random_draws.model_draws import without_dropout

Build = Callable[[PreTrainedConfig], PreTrainedModel]
_HEADS, _KV_HEADS = 8, 4
_MAX_LAYERS = 8
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
_HEAD_COUNTS = (
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
    *("num_decoder_attention_heads", "num_encoder_attention_heads", "attention_heads", "swa_num_attention_heads"),
)
_KV_HEAD_COUNTS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups")
_MLA_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")
_SSM_HEADS = (
    ("num_heads", "head_dim"),
    ("mamba_n_heads", "mamba_d_head"),
    ("mamba_num_heads", "mamba_head_dim"),
    ("n_mamba_heads", "mamba_headdim"),
)
_SHARING = "num_kv_shared_layers"  # the model's last ones
_SIZES = (
    (128, "hidden_size d_model n_embd dim embedding_size emb_dim ple_embed_dim output_embedding_size embedding_dim"),
    (64, "original_max_position_embeddings log_scaling_n_floor floor_scale max_inference_chunksize"),
    (160, "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (128, "attention_hidden_size pronunciation_vocab_size shape_vocab_size ngram_vocab_size_base"),
    (96, "intermediate_size ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff dff d_inner n_inner"),
    (96, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size lru_width"),
    (96, "shared_intermediate_size expert_ffn_hidden_size intermediate_size_mlp dense_intermediate_size"),
    (96, "shared_experts_intermediate_size feed_forward_size"),
    (16, "head_dim swa_head_dim kv_channels qk_nope_head_dim index_head_dim linear_key_head_dim linear_head_dim"),
    (16, "linear_value_head_dim mamba_d_state ssm_state_size state_size mamba_chunk_size chunk_size mamba_d_head"),
    (16, "mamba_head_dim mamba_headdim hidden_size_per_layer_input dim_head attention_head_dim d_rel d_head"),
    (16, "router_hidden_size block_size"),
    (8, "qk_rope_head_dim mamba_n_heads mamba_num_heads time_step_rank mamba_dt_rank rotary_dim adapter_rank"),
    (8, "laurel_rank n_mamba_heads linear_num_value_heads linear_num_heads"),
    (4, "linear_num_key_heads index_n_heads"),
    (12, "v_head_dim"),
    (24, "qk_head_dim sliding_window sliding_window_size local_attention window_size attention_window_size"),
    (32, "kv_lora_rank global_head_dim o_lora_rank hc_lowrank gated_norm_rank loop_gate_rank"),
    (40, "attention_chunk_size"),
    (48, "q_lora_rank"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_source_positions"),
    (512, "max_target_positions"),
    (8, "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num"),
    (2, "num_experts_per_tok moe_topk top_k_experts moe_k moe_top_k num_experts_per_token"),
    (1, "n_group topk_group num_expert_group"),
    (0, "num_nextn_predict_layers num_hash_layers"),
)
_BY_NAME = {name: size for size, names in _SIZES for name in names.split()}


def shrink(config: PreTrainedConfig, **changed: Any) -> PreTrainedConfig:
    """Return a tiny config of the same class, quick to train, with every kind of layer of the given one.

    Args:
        config: config of any model.
        changed: values to set in the tiny config.
    """
    values = config.to_dict()
    small = {name: _small(name, value, values) for name, value in values.items()}
    count = next((values[name] for name in _LAYERS if isinstance(values.get(name), int)), 0)
    kept = _kept_layers(values, count)
    for name, value in values.items():
        if name in _LAYERS and value == count:
            small[name] = len(kept)
        elif _are_layers(value, count):
            small[name] = [place for place, index in enumerate(kept) if index in value]
        elif isinstance(value, list) and len(value) == count:
            small[name] = [_small(name, value[index], values) for index in kept]
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            by_layer = {int(key): each for key, each in value.items()}
            small[name] = {place: by_layer[index] for place, index in enumerate(kept) if index in by_layer}
    if _SHARING in values:
        small[_SHARING] = sum(index >= count - values[_SHARING] for index in kept)
    small |= _keep_products(values, small)
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = shrink(value).to_dict()
    small |= changed
    return type(config).from_dict({key: value for key, value in small.items() if key != "transformers_version"})


def _keep_products(values: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Return the tiny config's sizes that are products or aliases of its other sizes."""
    found = {}
    if values.get("head_dim") and values["head_dim"] == values.get("qk_rope_head_dim"):
        found["head_dim"] = small["qk_rope_head_dim"]
    if values.get("swa_head_dim") and values["swa_head_dim"] == sum(values.get(each) or 0 for each in _MLA_PARTS):
        found["swa_head_dim"] = sum(small[each] for each in _MLA_PARTS)
    if values.get("attention_hidden_size") == 2 * values.get("hidden_size", 0):
        found["attention_hidden_size"] = 2 * small["hidden_size"]
        found["attention_head_dim"] = found["attention_hidden_size"] // _HEADS
    expand = values.get("mamba_expand") or values.get("expand")
    for heads, size in _SSM_HEADS:
        if not isinstance(small.get(heads), int) or not isinstance(small.get(size), int):
            continue
        if expand and values[heads] * values[size] == int(expand * values["hidden_size"]):
            found[size] = int(expand * small["hidden_size"]) // small[heads]
        if "mamba_d_ssm" in values:
            found["mamba_d_ssm"] = small[heads] * small[size]
    return found


def _small(name: str, value: Any, values: dict[str, Any]) -> Any:
    """Return one value of the tiny config."""
    if isinstance(value, dict) and name.startswith(("rope_", "partial_")):
        return {key: _small(key, each, values) for key, each in value.items()}
    if name in ("long_factor", "short_factor"):
        return value[:1] * 8 if isinstance(value, list) else value
    if isinstance(value, bool) or not isinstance(value, int) or not value:
        return value
    if name.endswith("_token_id"):
        return min(value, _BY_NAME["vocab_size"] - 1)
    if name in _HEAD_COUNTS:
        return _fewer_heads(value)  # an equally small model keeps its heads and their products
    if name in _KV_HEAD_COUNTS:
        heads = next((values[each] for each in _HEAD_COUNTS if isinstance(values.get(each), int)), value)
        fewer = _fewer_heads(heads)
        return fewer if value == heads else next(n for n in (_KV_HEADS, 2, 1) if n <= value and fewer % n == 0)
    return min(value, _BY_NAME[name]) if name in _BY_NAME else value


def _fewer_heads(heads: int) -> int:
    """Return a power of two, at most 8."""
    return min(_HEADS, 1 << (heads.bit_length() - 1))


def _kept_layers(values: dict[str, Any], count: int) -> list[int]:
    """Return the layers to keep, in order: the first of every kind, and at least four."""
    sharing = count - values.get(_SHARING, 0)
    sets = [value for value in values.values() if _are_layers(value, count)]
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == count and count > 1]
    lists = [each for each in lists if each not in sets]
    kinds = [
        repr([index >= sharing, *(index in each for each in sets), *(each[index] for each in lists)])
        for index in range(count)
    ]
    kept = {kinds.index(kind) for kind in dict.fromkeys(kinds)}
    for index in range(count):
        if len(kept) >= 4:
            break
        kept.add(index)
    return sorted(kept)[:_MAX_LAYERS]


def _are_layers(value: Any, count: int) -> bool:
    """Return True if a list holds layer indices, not one value per layer."""
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        return False
    return value == sorted(set(value)) and value[-1] < count and len(value) > 1


def trial_core(model_class: type[PreTrainedModel]) -> str:
    """Return the attention implementation of a trial on CPU; it gets the same inputs as the GPU's cores."""
    if model_class._supports_sdpa:
        return "sdpa"
    return TRIAL if model_class._supports_flash_attn or model_class._supports_flex_attn else "eager"


def _build(build: Build, config: PreTrainedConfig) -> PreTrainedModel:
    config = copy.deepcopy(config)
    if config._attn_implementation == TRIAL:
        config._attn_implementation = "eager"  # its reference
    return build(config)


def numel(build: Build, config: PreTrainedConfig) -> int:
    """Count the parameters of a model, on the meta device if it can be built there."""
    try:
        with torch.device("meta"):
            model = _build(build, config)
    except Exception:  # it reads values when it is built
        model = _build(build, config)
    return sum(param.numel() for param in model.parameters())


def small_model(build: Build, config: PreTrainedConfig) -> torch.nn.Module:
    """Build a tiny model with the same weights on every rank, random enough for sizable gradients."""
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # the CPU's alone: a GPU's is the program's
        model = _build(build, config).float()
        draw_weights(model)
    return model.train()


def load_config(model: str, small: bool) -> Any:
    """Load a model's config, shrunk if ``small``, without a cache and without dropout.

    Args:
        model: a config.json, a folder that has one, or a name on the hub.
        small: if True, shrink it.

    Raises:
        ConfigError: there is no config, or transformers does not know its ``model_type``.
    """
    check_model_file(model)
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
        stage = (ds_config.get("zero_optimization") or {}).get("stage")
        sharding = HfDeepSpeedConfig(ds_config) if stage == 3 else None
        model = AutoModelForCausalLM.from_pretrained(weights, config=config, dtype=dtype, attn_implementation=core)
        del sharding
        return model.train()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=core)
    draw_weights(model)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.to(dtype))
    return model.train()


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Replace the matrices of a model by random ones, large enough for sizable gradients."""
    for param in model.parameters():
        if param.dim() > 1:
            param.normal_(0.0, 1.0 / math.sqrt(param.shape[-1]))


def causal_lm(config: Any) -> PreTrainedModel:
    """Build a bf16 model with sdpa on the default device, with transformers' initial weights.

    Raises:
        UnsupportedModelError: transformers cannot build it.
    """
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    except ValueError as error:
        raise UnsupportedModelError(f"model_type='{config.model_type}': {str(error).partition('. ')[0]}") from error


def has_weights(model: str) -> bool:
    """Return True if a path is a folder with weights."""
    return os.path.isdir(model) and any(name.endswith((".safetensors", ".bin")) for name in os.listdir(model))

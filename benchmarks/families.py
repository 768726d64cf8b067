"""Tiny configs of many model families, with every kind of layer."""

from typing import Any

from transformers import CONFIG_MAPPING

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_FAMILIES = """
llama mistral qwen2 qwen3 gemma phi3 olmo olmo2 granite cohere glm glm4 helium starcoder2 smollm3 stablelm nemotron
mixtral qwen3_moe olmoe
"""
FAMILIES = _FAMILIES.split()
"""Families with full tests; the census covers all others."""
_LINEAR_FAMILIES = """
qwen3_next qwen3_5_text qwen3_5_moe_text lfm2 lfm2_moe lfm3 granitemoehybrid bamba falcon_h1 nemotron_h zamba2 mamba2
olmo_hybrid kimi_linear jamba mamba falcon_mamba zamba
"""
LINEAR_FAMILIES = _LINEAR_FAMILIES.split()
"""Families with layers other than attention."""
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 6, "mamba_chunk_size": 16}
_PER_FAMILY = {
    "mistral": {"sliding_window": None},
    "mixtral": {"sliding_window": None, "num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 24},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "deepseek_v2": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "phimoe": {"num_local_experts": 4, "sliding_window": None, "router_jitter_noise": 0.0},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    # One layer without rotary embedding (NoPE), as in the real model.
    "smollm3": {"no_rope_layers": [1, 0]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **_EXPERTS},
    "lfm3": {"layer_types": ["conv", "full_attention"], "sliding_window": None},
    "qwen3_next": {**_DELTA_NET, **_EXPERTS},
    "qwen3_5_text": {**_DELTA_NET, "head_dim": 16},
    "qwen3_5_moe_text": {**_DELTA_NET, **_EXPERTS, "head_dim": 16},
    "olmo_hybrid": {**_DELTA_NET, "linear_num_value_heads": 4},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        **_EXPERTS,
    },
    "bamba": {"attn_layer_indices": [1], **_MAMBA2, "mamba_n_groups": 2},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        **_MAMBA2,
        **_EXPERTS,
        "shared_intermediate_size": 24,
    },
    "falcon_h1": {**_MAMBA2, "mamba_n_groups": 2, "mamba_d_ssm": 64, "mamba_rms_norm": True},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention"],
        "num_hidden_layers": 3,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 4,
        "ssm_state_size": 6,
        "chunk_size": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 6,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 6, "chunk_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 6, "mamba_dt_rank": 4, **_EXPERTS},
    "mamba": {"state_size": 6, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 6, "time_step_rank": 4},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "mamba_d_state": 6,
        "mamba_dt_rank": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
}


def family_config(model_type: str, **changed: Any) -> Any:
    """Build a tiny config of a family."""
    return CONFIG_MAPPING[model_type](**{**SMALL, **_PER_FAMILY.get(model_type, {}), **changed})


_DENSE = {"interleave_moe_layer_step": 9, "intermediate_size_mlp": 48}
_ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    # For the cells' sequences of 48 tokens, and shards of 24 and 12.
    "window 7": ("mistral", {"sliding_window": 7}),
    "window 31": ("mistral", {"sliding_window": 31}),
    "some layers' window": ("qwen2", {"use_sliding_window": True, "sliding_window": 15, "max_window_layers": 1}),
    # Narrow: MKL sums 16,384 products with 4 times the error for matrices of 3 rows and fewer, a tile's.
    "chunks": ("llama4_text", {"attention_chunk_size": 10, "no_rope_layers": [1, 0], **_DENSE}),
    "mixture": ("mixtral", _ROUTED),
    "many experts": ("qwen3_moe", _ROUTED),
    # The norm of a head's output, which may be near zero, amplifies rounding if its eps is small, at SP 1 too.
    "gated delta net": ("qwen3_next", {"num_experts": 0, "rms_norm_eps": 1e-2}),
    "Kimi delta attention": ("kimi_linear", {}),
    "Mamba 2": ("bamba", {}),
    "Mamba 2 beside attention": ("falcon_h1", {}),
    "Mamba": ("falcon_mamba", {}),
    "Mamba and attention": ("jamba", {}),
    "short convolution": ("lfm2", {}),
}
"""Models that a parity cell may train instead of its Llama: a family and the changed keys."""


def kind_config(kind: str, **more: Any) -> Any:
    """Build the config of one of ``KINDS``; without a cache, which would disable packed documents."""
    model_type, changed = KINDS[kind]
    return family_config(model_type, use_cache=False, **changed, **more)

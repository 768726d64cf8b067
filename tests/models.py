"""Small models of many families, with each kind of layer; one step of them in fp64, whole and split."""

from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from transformers import CONFIG_MAPPING

from benchmarks.cells import KeepFp64, build_model
from deepspeed_alst.data.shard import REAL_TOKENS, shard_batch
from deepspeed_alst.models.calls import Calls
from deepspeed_alst.models.patches import patch_model

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
FAMILIES = (
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
"""Of all kinds that are tested at length; the census asks about every other."""
LINEAR_FAMILIES = (
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
"""With layers that are no attention."""
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
    "phimoe": {"num_local_experts": 4, "sliding_window": None, "router_jitter_noise": 0.0},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 8},
    # A layer without rotary embedding (NoPE), as in the real one.
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
    """A small config of a family."""
    return CONFIG_MAPPING[model_type](**{**SMALL, **_PER_FAMILY.get(model_type, {}), **changed})


def family_batch(length: int, rows: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random tokens, of which every third has no label."""
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SMALL["vocab_size"], (rows, length), generator=make)
    labels = ids.clone()
    labels[:, ::3] = -100
    return {"input_ids": ids, "labels": labels}


def step_in_fp64(
    config: Any, batch: dict[str, torch.Tensor], group: Any = None, multiple: int = 0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, all in fp64: whole if there is no group, else split over it.

    Split, the sequence is padded to a ``multiple``, by default of the number of ranks.
    Gradients of the split run are averaged over the ranks, as DeepSpeed does it.
    """
    # Eager experts: the grouped matrix product of the default has no fp64.
    config._experts_implementation = "eager"
    model = build_model(config).double()
    with ExitStack() as undo, KeepFp64():
        if group is not None:
            sp_size, calls = dist.get_world_size(group), Calls()
            batch = shard_batch(batch, sp_size, multiple or sp_size, marks_padding=True).shards[dist.get_rank(group)]
            calls.real_tokens = batch.pop(REAL_TOKENS)
            patch_model(model, group, undo, calls)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    grads = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    if group is not None:
        for grad in grads.values():
            dist.all_reduce(grad, group=group)
            grad /= sp_size
    return loss.item(), grads


def split_and_whole(
    config: Any, length: int, rows: int = 1, sp_size: int = 2, multiple: int = 0, padding: int = 0
) -> tuple[float, dict[str, float]]:
    """Relative error of the split run's loss, and of each gradient, against the whole run's.

    The first row ends with ``padding`` tokens that its mask hides.
    """
    batch = family_batch(length, rows)
    if padding:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -padding:] = 0
        batch["labels"][0, -padding:] = -100
    whole_loss, whole = step_in_fp64(config, batch)
    groups = [dist.new_group(list(range(first, first + sp_size))) for first in range(0, dist.get_world_size(), sp_size)]
    loss, grads = step_in_fp64(config, batch, groups[dist.get_rank() // sp_size], multiple)
    # A rank's batch may leave an expert without a token, and its gradient None.
    assert grads.keys() == whole.keys()
    worst = {name: float((grads[name] - true).norm() / true.norm()) for name, true in whole.items() if true.norm()}
    return abs(loss - whole_loss) / whole_loss, worst

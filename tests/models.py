"""Small models of twenty families, and one step of them in fp64, whole and split over the ranks."""

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

"""A degree that does not divide the heads: loss and gradients are those of the run without it, in fp64.

Ranks then hold unequal numbers of query heads, and KV heads may be on some ranks only.
"""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers import AttentionInterface

from benchmarks.cells import build_model
from benchmarks.families import family_config
from benchmarks.ranks import Ranks
from benchmarks.tally import Tally
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.hf_attention import TRIAL, causal_sdpa
from deepspeed_alst.attention.ulysses import ulysses_attention
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.offload.checkpoint_inputs import Chunks
from deepspeed_alst.offload.feature import layer_sizes
from tests.attention.test_cores import errors_of_arguments, errors_of_packing, errors_of_windows
from tests.attention.test_kept_attention import split_pair
from tests.models import split_and_whole
from tests.random_draws.test_dropout import split_and_whole as with_dropout

EXACT = 1e-12
LEAN = MemoryLeanConfig(chunk_tokens=8, tile_tokens=3, key_block=5)


def heads(query: int, kv: int, **changed: Any) -> dict[str, Any]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, **changed}


def assert_exact(ranks: Ranks, sp_size: int, config: Any, lean: MemoryLeanConfig | None = None, core: str = "") -> None:
    loss, grads = ranks.run(split_and_whole, config, 37, 2, sp_size, 0, 0, lean, core)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


# Heads that straddle KV heads in unequal numbers, which are then expanded: 8/4 on 3 ranks.
ON_THREE = {
    "4/2": ("llama", heads(4, 2), ""),
    "5/5": ("qwen3", heads(5, 5), ""),
    "8/4": ("qwen3", heads(8, 4), ""),
    "6/2, as many query heads on each": ("qwen3", heads(6, 2), ""),
    "a window": ("mistral", heads(8, 4, sliding_window=7), ""),
    "MLA": ("deepseek_v2", {}, ""),
    "sinks": ("gpt_oss", heads(8, 4, num_local_experts=4, sliding_window=6), TRIAL),
    "a soft cap": ("gemma2", heads(8, 4, sliding_window=6, attn_logit_softcapping=0.5), TRIAL),
}


@pytest.mark.parametrize("name", ON_THREE)
def test_three_ranks_are_exact(name, ranks3):
    model_type, changed, core = ON_THREE[name]
    assert_exact(ranks3, 3, family_config(model_type, **changed), None, core)


@pytest.mark.parametrize("name", ["4/2", "8/4", "MLA", "sinks"])
def test_three_ranks_are_exact_in_chunks(name, ranks3):
    model_type, changed, core = ON_THREE[name]
    assert_exact(ranks3, 3, family_config(model_type, **changed), LEAN, core)


@pytest.mark.parametrize(("query", "kv", "sp_size"), [(14, 2, 4), (6, 3, 4), (7, 1, 2)])
def test_two_and_four_ranks_are_exact(query, kv, sp_size, ranks4):
    assert_exact(ranks4, sp_size, family_config("qwen3", **heads(query, kv)))


@pytest.mark.slow
@pytest.mark.parametrize(("query", "kv"), [(28, 4), (40, 8)])
def test_eight_ranks_are_exact(query, kv):
    with Ranks(8) as ranks:
        assert_exact(ranks, 8, family_config("qwen2", **heads(query, kv, head_dim=2, num_hidden_layers=1)))


@pytest.mark.parametrize("changed", [{}, {"sliding_window": 5}], ids=["full", "window"])
@pytest.mark.parametrize("core", ["sdpa", "flash_attention_2"])
def test_packed_documents_are_exact(core, changed, ranks3):
    """sdpa: run here. Flash attention: stand-in."""
    same_core, truth, _ = ranks3.run(errors_of_packing, core, "position_ids", 3, 3, {**heads(8, 4), **changed})[0]
    assert same_core < EXACT and truth < EXACT


def test_flash_attention_gets_windows_sinks_and_soft_caps(ranks3):
    """Stand-in."""
    same_core, sdpa, _ = ranks3.run(errors_of_windows, "mistral", heads(8, 4, sliding_window=11), 3)[0]
    assert same_core < EXACT and sdpa < EXACT
    changed = {"sliding_window": 11, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}
    assert ranks3.run(errors_of_arguments, "gpt_oss", "flash_attention_4", 3, changed)[0][0] < EXACT
    changed = {"sliding_window": 11, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    assert ranks3.run(errors_of_arguments, "gemma2", "flash_attention_2", 3, changed)[0][0] < EXACT


@pytest.mark.parametrize(
    ("setting", "recomputed"),
    [
        (heads(5, 5, reentrant=True), 1),
        (heads(5, 5, dtype=torch.bfloat16), 1),
        (heads(8, 4), 2),  # query heads share KV heads on rank 0 only, whose kernel may be another
        (heads(8, 4, reentrant=True, core="flash_attention_2", packed=True), 2),
    ],
    ids=str,
)
def test_a_kept_output_changes_no_bit(setting, recomputed, ranks3):
    for found in ranks3.run(split_pair, {"family": "mistral", **setting}):
        assert found["same"] and all(found["kept"])
        assert found[False][1:] == (2, 2, 2) and found[True][1:] == (2, recomputed, 2)
        assert found[True][0] * 2 == found[False][0], "attention's forward runs once"


def test_dropout_of_attention_is_drawn_by_the_heads_of_the_whole_model(ranks3):
    config = family_config("seed_oss", **heads(8, 4))
    assert config.attention_dropout > 0
    assert ranks3.run(with_dropout, config, {}, {})[0] < EXACT


def groups_by_the_module(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs):
    """A program's own attention, which repeats KV heads as transformers' functions do."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    return causal_sdpa(query, key, value, kwargs["scaling"], 0.0).transpose(1, 2), None


def errors_of_an_own_function(config: Any) -> tuple[float, dict[str, float]]:
    with mock.patch.dict(AttentionInterface._global_mapping, {"sdpa": groups_by_the_module}):
        return split_and_whole(config, 37, 2, 3)


def test_a_function_of_the_program_is_told_the_ranks_own_groups(ranks3):
    loss, grads = ranks3.run(errors_of_an_own_function, family_config("qwen3", **heads(8, 4)))[0]
    assert loss < EXACT and max(grads.values()) < EXACT


def test_a_kept_output_is_planned_for_the_rank_with_the_most_heads():
    model = build_model(family_config("qwen3", **heads(8, 4)))
    model.gradient_checkpointing_enable()
    one, three = (layer_sizes(ModelSpec(model.train()), 0, Chunks(), sp_size) for sp_size in (1, 3))
    assert (three.output_bytes, three.lse_bytes) == (one.output_bytes * 9 // 8, one.lse_bytes * 9 // 8)
    assert (three.input_bytes, three.head_elements) == (one.input_bytes, one.head_elements)


# --- the wire


def sent_and_received(query: int, kv: int, D: int) -> list[tuple[int, int]]:
    """Elements that this rank sends and receives in the forward's and in the backward's all-to-alls."""
    torch.manual_seed(dist.get_rank())
    q, k, v = (torch.randn(2, number, 5, D, requires_grad=True) for number in (query, kv, kv))
    tally = Tally()
    with tally.installed(), tally.phase("all"):
        ulysses_attention(q, k, v, None, lambda q, k, v: causal_sdpa(q, k, v, None, 0.0)).sum().backward()
    return [(each.sent // 4, each.received // 4) for each in tally.launched]


@pytest.mark.parametrize(("query", "kv"), [(4, 2), (8, 4), (5, 5)])
def test_ranks_exchange_their_own_heads_and_no_more(query, kv, ranks3):
    D, tokens, plan = 6, 2 * 5, HeadPlan(3, query, kv)
    q, k = ([len(each) for each in plan.split(number)] for number in (query, kv))
    qkv = [tokens * D * (a + 2 * b) for a, b in zip(q, k, strict=True)]
    for rank, found in enumerate(ranks3.run(sent_and_received, query, kv, D)):
        others = sum(qkv) - qkv[rank]
        output = (tokens * D * 2 * q[rank], tokens * D * (query - q[rank]))
        assert found == [(others, 2 * qkv[rank]), output, output[::-1], (2 * qkv[rank], others)]
        assert max(sum(x) for x in zip(*found[:2], strict=True)) <= plan.exchanged_heads * tokens * D

"""Ranks that share KV heads hold a part of the keys each, and give the loss and gradients of one rank, in fp64."""

import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from benchmarks.cells import Cell, KeepFp64
from benchmarks.families import family_config
from benchmarks.ranks import Ranks
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.hf_attention import TRIAL
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.memory_lean import decoder_layer, norm
from deepspeed_alst.memory_lean.exchange import HeadExchange
from deepspeed_alst.memory_lean.feature import run_in_chunks
from deepspeed_alst.memory_lean.key_blocks import KeyBlocks
from deepspeed_alst.sequence_parallel.feature import patch_model
from tests.attention import test_cores
from tests.attention.test_cores import DOCUMENTS, document_by_document, packed_batch, split_step, worst
from tests.attention.test_uneven_heads import EXACT, assert_exact, heads
from tests.models import split_and_whole
from tests.random_draws.test_dropout import EXACT_BUT_FOR_CASTS
from tests.random_draws.test_dropout import split_and_whole as with_dropout
from tests.system.test_parity import check_parity

# 10 tokens of a shard: chunks of 3, 3, 3 and 1, of which some of 4 ranks have no row; two chunks and more in a block.
LEAN = MemoryLeanConfig(chunk_tokens=3, tile_tokens=2, key_block=8)
CASES = {
    "4/2": ("qwen3", heads(4, 2)),
    "2/1 and a window": ("mistral", heads(2, 1, sliding_window=7)),
    "2/2 and chunks": ("llama4_text", heads(2, 2)),
    "8/2": ("llama", heads(8, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_of_several_chunks_are_exact(name, ranks4):
    model_type, changed = CASES[name]
    loss, grads = ranks4.run(split_and_whole, family_config(model_type, **changed), 37, 2, 4, 0, 0, LEAN)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


@pytest.mark.slow
def test_seven_heads_on_two_of_eight_ranks_are_exact():
    """3 and 4 query heads on the two ranks of a KV head."""
    with Ranks(8) as ranks:
        config = family_config("qwen2", **heads(28, 4, head_dim=2, num_hidden_layers=1))
        loss, grads = ranks.run(split_and_whole, config, 37, 1, 8, 0, 0, LEAN)[0]
    assert loss < EXACT and max(grads.values()) < EXACT


def error_of_packing(changed: dict[str, Any]) -> float:
    def patch(spec: Any, group: Any, undo: Any, calls: Any) -> None:
        spec.outer.activation_checkpointing_enable({"use_reentrant": False})
        patch_model(spec, group, undo, calls)
        assert run_in_chunks(spec, LEAN, group, calls, lambda layer: None, undo) == (2, {})

    config = family_config("mistral", **changed)
    with (
        warnings.catch_warnings(),
        mock.patch.object(test_cores, "patch_model", patch),
        mock.patch.object(decoder_layer, "current_autocast", lambda kind: KeepFp64),
        mock.patch.object(norm, "current_autocast", lambda kind: KeepFp64),
    ):
        warnings.filterwarnings("error", message="alst.memory_lean_layer")  # a layer on the ordinary path
        split = split_step("sdpa", config, packed_batch(), 4, 40)
    return worst(split, document_by_document(config, packed_batch(), DOCUMENTS))


@pytest.mark.parametrize("changed", [heads(2, 1), heads(4, 2, sliding_window=5)], ids=["full", "window"])
def test_packed_documents_are_exact(changed, ranks4):
    assert max(ranks4.run(error_of_packing, changed)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("gpt_oss", heads(4, 2, num_local_experts=4, sliding_window=6)),
        ("gemma2", heads(4, 1, sliding_window=6, attn_logit_softcapping=0.5)),
    ],
    ids=["sinks", "a soft cap"],
)
def test_sinks_and_a_soft_cap_are_exact(model_type, changed, ranks4):
    assert_exact(ranks4, 4, family_config(model_type, **changed), LEAN, TRIAL)


@pytest.mark.slow
@pytest.mark.parametrize(("query", "kv"), [(4, 2), (2, 1)])
def test_dropout_of_attention_draws_what_one_sequence_draws(query, kv, ranks4):
    config = family_config("seed_oss", **heads(query, kv))
    assert config.attention_dropout > 0
    split, whole = {"checkpointing": "plain", "lean": True}, {"checkpointing": "reentrant"}
    assert ranks4.run(with_dropout, config, split, whole)[0] < EXACT_BUT_FOR_CASTS


SHARED = Cell(world_size=4, sp_size=4, kv_heads=1, lean=True, checkpointing="non-reentrant")
FULL = replace(SHARED, odd_lengths=True, unequal_labels=True, clip=0.5)
CELLS = [
    replace(FULL, stage=0, gas=2),
    replace(SHARED, stage=0, dtype="bf16", checkpointing="reentrant"),
    replace(FULL, stage=1, kv_heads=2, lora=True, offload="host"),
    replace(SHARED, stage=1, heads=2, dtype="bf16", lora=True, offload="outputs"),
    replace(FULL, stage=2, sp_size=2, gas=2, offload="disk"),
    replace(SHARED, stage=2, kv_heads=2, frozen="layer 0", offload="outputs", documents=True),
    replace(FULL, stage=3, gas=2, tiles=True, offload="outputs"),
    replace(FULL, stage=3, kv_heads=2, lora=True, offload="outputs", checkpointing="reentrant"),
    replace(SHARED, stage=3, heads=2, dtype="bf16", offload="host", tiles=True),
    replace(FULL, stage=3, frozen="all but norms", offload_optimizer=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name())
def test_training_is_as_exact_as_without_sequence_parallelism(cell, ranks4):
    check_parity(cell, ranks4)


@pytest.mark.parametrize(("tokens", "chunk", "key_block"), [(10, 3, 8), (7, 7, 100), (5, 2, 1)])
def test_blocks_are_the_sequence_in_order(tokens, chunk, key_block):
    chunks = [slice(first, min(tokens, first + chunk)) for first in range(0, tokens, chunk)]
    plan = HeadPlan(8, 4, 2, divides_kv=True)
    blocks = KeyBlocks(HeadExchange(plan, None, object()), chunks, (1, 1), key_block).blocks_with([(0, 8 * tokens)])
    bounds = [block.keys.start for block in blocks], [block.keys.stop for block in blocks]
    assert bounds[0] == [0, *bounds[1][:-1]] and bounds[1][-1] == 8 * tokens
    for keys, own, sizes in blocks:
        assert sum(sizes) == keys.stop - keys.start <= max(chunk, key_block)
        assert own.stop - own.start == sum(-(-size // 4) for size in sizes)


@pytest.mark.parametrize(
    ("P", "H", "K", "sharers"),
    [
        (64, 32, 8, 8),
        (32, 32, 8, 4),
        (8, 28, 4, 2),
        (4, 2, 2, 2),
        (4, 3, 3, 4),
        (8, 32, 8, 1),
        (4, 6, 3, 1),
        (12, 40, 8, 1),
    ],
)
def test_ranks_that_share_kv_heads_have_each_row_once(P, H, K, sharers):
    plan = HeadPlan(P, H, K, divides_kv=True)
    assert plan.kv_sharers == plan.kv_parts == sharers and HeadPlan(P, H, K).kv_parts == 1
    shares = plan.shares("k", 10)
    for first in range(0, P, sharers) if sharers > 1 else ():
        group = shares[first : first + sharers]
        assert len({share.heads for share in group}) == 1
        assert [row for share in group for rows in share.rows for row in rows] == list(range(10))

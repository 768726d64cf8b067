"""A sequence on several nodes: rows of shared KV heads cross the network once, and results stay those of one rank."""

import os
import sys
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell
from benchmarks.families import family_config
from benchmarks.tally import Tally
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.hf_attention import TRIAL, causal_sdpa
from deepspeed_alst.attention.ulysses import ulysses_attention
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.distributed.mesh import build_adjacent, build_control_group, destroy_groups, ranks_of_node
from tests.attention.test_cores import errors_of_packing
from tests.attention.test_kept_attention import split_pair
from tests.attention.test_uneven_heads import EXACT, heads
from tests.models import split_and_whole
from tests.system.test_parity import check_parity

CASES = {
    "4/1": ("qwen3", heads(4, 1), ""),
    "4/2": ("qwen3", heads(4, 2), ""),
    "2/1, fewer heads than ranks": ("llama", heads(2, 1), ""),
    "MLA, fewer heads than ranks": ("deepseek_v2", heads(2, 2), ""),
    "a window": ("mistral", heads(4, 1, sliding_window=7), ""),
    "sinks": ("gpt_oss", heads(4, 2, num_local_experts=4, sliding_window=6), TRIAL),
    "a delta net beside attention": ("qwen3_next", heads(4, 2, num_experts=0), ""),
}


def on_nodes_of(size: int, function: Any, *args: Any) -> Any:
    """Run a function of a test module whose model's ranks are on nodes of some."""
    with mock.patch.object(sys.modules[function.__module__], "ForwardContext", partial(ForwardContext, node_size=size)):
        return function(*args)


def errors_on_nodes(config: Any, length: int, core: str) -> tuple[float, float]:
    tally = Tally()
    with tally.installed(), tally.phase("all"):
        loss, grads = on_nodes_of(2, split_and_whole, config, length, 2, 4, 0, 0, None, core)
    assert any(each.name == "all_gather_into_tensor" for each in tally.launched)
    return loss, max(grads.values())


@pytest.mark.parametrize("name", CASES)
def test_two_nodes_of_two_ranks_are_exact(name, ranks4):
    model_type, changed, core = CASES[name]
    assert max(ranks4.run(errors_on_nodes, family_config(model_type, **changed), 37, core)[0]) < EXACT


@pytest.mark.parametrize("length", [3, 9])
def test_shards_that_the_ranks_of_a_node_do_not_divide_are_exact(length, ranks4):
    """Shards of 1 and 3 tokens: the second rank has no row, or one less."""
    assert max(ranks4.run(errors_on_nodes, family_config("qwen3", **heads(4, 1)), length, "")[0]) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("core", ["sdpa", "flash_attention_2"])
def test_packed_documents_are_exact(core, ranks4):
    """Flash attention at SP 1: stand-in."""
    arguments = core, "position_ids", 4, 4, heads(4, 1)
    same_core, truth, _ = ranks4.run(on_nodes_of, 2, errors_of_packing, *arguments)[0]
    assert same_core < EXACT and truth < EXACT


@pytest.mark.parametrize(
    "setting",
    [
        heads(4, 1, reentrant=True),
        heads(4, 2, dtype=torch.bfloat16),
        heads(4, 1, core="flash_attention_2", packed=True),
    ],
    ids=str,
)
def test_a_kept_output_changes_no_bit(setting, ranks4):
    """Forwards of attention, and all-to-alls of each pass: one more in the backward, inside of a node."""
    arguments = {"family": "mistral", **setting}
    for found in ranks4.run(on_nodes_of, 2, split_pair, arguments):
        assert found["same"] and all(found["kept"])
        assert found[False] == (2, 2, 2, 3) and found[True] == (1, 2, 1, 3)


def bits(node_size: int, dtype: torch.dtype, D: int = 6, s: int = 5) -> tuple[Any, list[tuple[str, int, int]]]:
    """Output and gradients of attention by 4 query and 2 KV heads, and the name and bytes of each collective."""
    torch.manual_seed(dist.get_rank())
    q, k, v = (torch.randn(2, number, s, D, dtype=dtype, requires_grad=True) for number in (4, 2, 2))
    plan, tally = HeadPlan(4, 4, 2, node_size=node_size), Tally()
    group = build_adjacent(plan.kv_parts)
    with tally.installed(), tally.phase("all"):
        out = ulysses_attention(q, k, v, None, lambda q, k, v: causal_sdpa(q, k, v, None, 0.0), None, plan, group)
        grads = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape, dtype=dtype))
    destroy_groups(group)
    return [x.tolist() for x in (out, *grads)], [(each.name, each.sent, each.received) for each in tally.launched]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_bit_changes_and_a_row_crosses_once(dtype, ranks4):
    row = 2 * 6 * dtype.itemsize
    for one, two in zip(ranks4.run(bits, 4, dtype), ranks4.run(bits, 2, dtype), strict=True):
        assert one[0] == two[0]
        assert [name for name, *_ in one[1]] == ["all_to_all_single"] * 4
        assert [name for name, *_ in two[1]] == [
            *("all_to_all_single", "all_gather_into_tensor", "all_to_all_single"),
            *("all_to_all_single", "all_to_all_single", "all_to_all_single"),
        ]
        # Of 5 rows of K and V one rank of a node gets 3, the other 2; they gather 3 of each of 4 shards.
        of_others = two[1][0][2]
        assert one[1][0][2] == 3 * 5 * 3 * row and of_others in (3 * (5 + 2 * 3) * row, 3 * (5 + 2 * 2) * row)
        assert two[1][1][1] == 4 * 3 * 2 * row


@pytest.mark.parametrize(
    ("P", "H", "K", "node", "parts"),
    [
        (8, 8, 2, 4, 4),
        (64, 32, 8, 8, 8),
        (64, 28, 4, 8, 8),  # 16 ranks on 2 nodes share a KV head
        (16, 32, 8, 8, 2),
        (8, 8, 2, 8, 1),  # one node
        (4, 4, 1, 8, 1),  # two sequences on a node
        (8, 8, 8, 4, 1),
        (8, 8, 2, 1, 1),
        (12, 12, 2, 4, 2),  # 6 ranks share a KV head, on nodes of 4
        (8, 8, 2, 0, 1),  # unknown
    ],
)
def test_the_ranks_of_a_node_that_share_kv_heads_divide_their_rows(P, H, K, node, parts):
    plan = HeadPlan(P, H, K, node_size=node)
    assert plan.kv_parts == parts and HeadPlan(P, H, K, True, node).kv_parts == plan.kv_sharers
    assert ("of its node" in plan.kv_summary) == (parts > 1)
    shares = plan.shares("k", 10)
    for first in range(0, P, parts) if parts > 1 else ():
        assert len({share.heads for share in shares[first : first + parts]}) == 1
        assert first // node == (first + parts - 1) // node, "on one node"
        assert [row for share in shares[first : first + parts] for rows in share.rows for row in rows] == [*range(10)]


def launched_on(size: int, name: str = "LOCAL_WORLD_SIZE", **changed: str) -> None:
    """Set what a launcher with nodes of some ranks sets; 0 for one node."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.pop("LOCAL_WORLD_SIZE", None)
    os.environ |= {"LOCAL_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if size:
        os.environ |= {name: str(size), "LOCAL_RANK": str(rank % size)} | changed


def nodes_found(*launched: Any) -> int:
    launched_on(*launched)
    if launched == (-2,):  # nodes of 1 and 3 ranks
        rank = dist.get_rank()
        os.environ |= {"LOCAL_WORLD_SIZE": str(3 if rank else 1), "LOCAL_RANK": str(max(0, rank - 1))}
    if launched == (-3,):  # dealt out in turn
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank() // 2)}
    group = build_control_group()
    try:
        return ranks_of_node(group)
    finally:
        destroy_groups(group)
        launched_on(0)


@pytest.mark.parametrize(
    ("launched", "found"), [((2,), 2), ((2, "LOCAL_SIZE"), 2), ((0,), 4), ((-2,), 0), ((-3,), 0)], ids=str
)
def test_nodes_are_found_by_the_launchers_variables(launched, found, ranks4):
    assert ranks4.run(nodes_found, *launched) == [found] * 4


TWO_NODES = Cell(world_size=4, sp_size=4, kv_heads=1)


@pytest.mark.parametrize(
    "cell",
    [
        replace(TWO_NODES, stage=2, checkpointing="non-reentrant", offload="outputs", odd_lengths=True, clip=0.5),
        *(
            pytest.param(cell, marks=pytest.mark.slow)
            for cell in (
                replace(TWO_NODES, stage=0, dtype="bf16", heads=2),
                replace(TWO_NODES, stage=3, kv_heads=2, lora=True, checkpointing="reentrant", offload="host"),
                replace(TWO_NODES, stage=3, lean=True, checkpointing="non-reentrant", offload="outputs"),
                replace(TWO_NODES, stage=1, gas=2, model="gated delta net", unequal_labels=True),
            )
        ),
    ],
    ids=lambda cell: cell.name(),
)
def test_training_is_as_exact_as_without_sequence_parallelism(cell, ranks4):
    ranks4.run(launched_on, 2)
    try:
        check_parity(cell, ranks4)
    finally:
        ranks4.run(launched_on, 0)

"""More ranks than query heads: loss and gradients are those of the run without it, in fp64.

Ranks then share the query rows of their heads, each with the whole sequence's keys and values.
"""

import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaForCausalLM

from benchmarks.cells import build_model
from benchmarks.families import family_config
from benchmarks.ranks import RankError, Ranks
from deepspeed_alst.attention import row_attention
from deepspeed_alst.attention.attention_kernels import Dropout, TorchKernel
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.hf_attention import TRIAL, find_backend
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.attention.row_attention import check_rows
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.offload.checkpoint_inputs import Chunks
from deepspeed_alst.offload.feature import layer_sizes
from tests.attention.test_cores import errors_of_arguments, errors_of_packing, errors_of_windows
from tests.attention.test_kept_attention import split_pair
from tests.attention.test_uneven_heads import (
    EXACT,
    LEAN,
    assert_exact,
    errors_of_an_own_function,
    groups_by_the_module,
    heads,
)
from tests.attention.test_uneven_heads import sent_and_received as exchanged
from tests.models import proved, split_and_whole
from tests.random_draws.test_dropout import split_and_whole as with_dropout

MLA = {"num_attention_heads": 2, "num_key_value_heads": 2}
ON_FOUR = {
    "2/2": ("qwen3", heads(2, 2), ""),
    "2/1": ("llama", heads(2, 1), ""),
    "3/1": ("qwen3", heads(3, 1), ""),
    "3/3, unequal heads": ("qwen3", heads(3, 3), ""),
    "a window": ("mistral", heads(2, 1, sliding_window=7), ""),
    "chunks": ("llama4_text", heads(2, 1), ""),
    "MLA": ("deepseek_v2", MLA, ""),
    "sinks": ("gpt_oss", heads(2, 1, num_local_experts=4, sliding_window=6), TRIAL),
    "a soft cap": ("gemma2", heads(2, 1, sliding_window=6, attn_logit_softcapping=0.5), TRIAL),
    "a delta net beside attention": ("qwen3_next", heads(2, 1, num_experts=0), ""),
}


@pytest.mark.parametrize("name", ON_FOUR)
def test_four_ranks_are_exact(name, ranks4):
    model_type, changed, core = ON_FOUR[name]
    assert_exact(ranks4, 4, family_config(model_type, **changed), None, core)


@pytest.mark.parametrize("name", ["2/1", "3/3, unequal heads", "a window", "MLA", "sinks"])
def test_four_ranks_are_exact_in_chunks(name, ranks4):
    model_type, changed, core = ON_FOUR[name]
    assert_exact(ranks4, 4, family_config(model_type, **changed), LEAN, core)


@pytest.mark.parametrize("lean", [None, LEAN], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("length", "padding"), [(3, 0), (5, 2), (37, 20)])
def test_short_shards_and_padding_are_exact(length, padding, lean, ranks4):
    """Of one token some ranks have no row."""
    config = family_config("qwen3", **heads(1, 1))
    loss, grads = ranks4.run(split_and_whole, config, length, 2, 4, 0, padding, lean)[0]
    assert loss < EXACT and max(grads.values()) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize(("query", "kv"), [(4, 2), (6, 3), (7, 7)])
def test_eight_ranks_are_exact(query, kv):
    """Of 6 heads 3 straddle two KV heads; of 7 ranks have 1 or 2."""
    config = family_config("qwen2", **heads(query, kv, head_dim=4, num_hidden_layers=1))
    with Ranks(8) as ranks:
        assert_exact(ranks, 8, config)
        assert_exact(ranks, 8, config, LEAN)


class OwnModel(LlamaForCausalLM):
    """A class of the program, which a tiny model with 8 heads is to prove."""


def try_an_own_model() -> str:
    config = family_config("llama", **heads(20, 4, hidden_size=160))
    config._attn_implementation = "sdpa"
    return proved(OwnModel(config))


@pytest.mark.slow
def test_a_model_that_is_not_listed_is_tried_on_more_ranks_than_a_tiny_model_has_heads():
    with Ranks(10) as ranks:
        assert re.fullmatch(r"a tiny model is right to \de-0\d; packed: right", ranks.run(try_an_own_model)[0])


@pytest.mark.parametrize("changed", [{}, {"sliding_window": 5}], ids=["full", "window"])
@pytest.mark.parametrize("core", ["sdpa", "flash_attention_2"])
def test_packed_documents_are_exact(core, changed, ranks4):
    """Flash attention at SP 1: stand-in."""
    same_core, truth, _ = ranks4.run(errors_of_packing, core, "position_ids", 4, 4, {**heads(2, 1), **changed})[0]
    assert same_core < EXACT and truth < EXACT


def test_flash_attentions_windows_sinks_and_soft_caps_are_exact(ranks4):
    """At SP 1: stand-in."""
    same_core, sdpa, _ = ranks4.run(errors_of_windows, "mistral", heads(2, 1, sliding_window=11), 4)[0]
    assert same_core < EXACT and sdpa < EXACT
    changed = {"sliding_window": 11, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}
    assert ranks4.run(errors_of_arguments, "gpt_oss", "flash_attention_4", 4, heads(2, 1, **changed))[0][0] < EXACT


@pytest.mark.parametrize(
    "setting",
    [
        heads(2, 1, reentrant=True),
        heads(2, 2, dtype=torch.bfloat16),
        heads(3, 1, core="flash_attention_2", packed=True),
    ],
    ids=str,
)
def test_a_kept_output_changes_no_bit(setting, ranks4):
    for found in ranks4.run(split_pair, {"family": "mistral", **setting}):
        assert found["same"] and all(found["kept"])
        assert found[False][1:] == (2, 2, 2) and found[True][1:] == (2, 2, 2)
        # Evaluation runs it once more, which is not counted as a forward of one kernel call.
        assert (found[True][0] + 1) * 3 == (found[False][0] + 1) * 2, "attention's forward runs once"


def test_attention_with_dropout_draws_what_one_sequence_draws(ranks3):
    assert ranks3.run(with_dropout, family_config("seed_oss", **heads(2, 1)), {}, {})[0] < EXACT


def test_a_function_of_the_program_is_refused(ranks3):
    with pytest.raises(RankError) as caught:
        ranks3.run(errors_of_an_own_function, family_config("qwen3", **heads(2, 1)))
    for each in caught.value.errors:
        assert isinstance(each, UnsupportedModelError)
        assert "the program's own function under attn_implementation='sdpa' cannot share the rows" in str(each)
        assert "Set sequence_parallel_size to at most" in str(each)


def test_an_argument_without_a_kernel_for_rows_is_refused():
    x = torch.zeros(1, 1, 4, 8)
    call = torch.nn.Module(), range(1), [(0, 4)], None, None, {"deterministic": True}, find_backend("sdpa"), None
    with pytest.raises(UnsupportedModelError, match=r"with deterministic cannot share the rows.*at most the"):
        row_attention.attend_rows(*call, x, x, x)


MASKS = [None, MaskSpec(7), MaskSpec(None, 9), MaskSpec(5, None, (0, 20, 48))]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_gradients_of_keys_are_summed_in_blocks(mask, monkeypatch):
    monkeypatch.setattr(row_attention, "KEY_BLOCK", 5)
    make, (h, k, S, D) = torch.Generator().manual_seed(0), (6, 2, 48, 8)
    q, keys, values = (torch.randn(2, n, S, D, generator=make, dtype=torch.float64).requires_grad_() for n in (h, k, k))
    seen = (mask or MaskSpec()).seen(S)
    whole = F.scaled_dot_product_attention(q, keys, values, seen, enable_gqa=True)
    do = torch.randn(whole.shape, generator=make, dtype=torch.float64)
    truth = torch.autograd.grad(whole, (q, keys, values), do)
    grads = [torch.zeros_like(x) for x in truth]
    plan = HeadPlan(4, 1, 1)
    for rank in range(4):
        intervals = list(plan.rows(rank, 12))
        mine = torch.cat([torch.arange(*each) for each in intervals])
        call = torch.nn.Module(), range(h), intervals, mask, None, {}, find_backend("sdpa"), None
        o = row_attention.attend_rows(*call, q[:, :, mine], keys, values)
        torch.testing.assert_close(o, whole[:, :, mine], rtol=0, atol=1e-13)
        for total, grad in zip(grads, torch.autograd.grad(o, (q, keys, values), do[:, :, mine]), strict=True):
            total += grad
    for total, true in zip(grads, truth, strict=True):
        assert (total - true).norm() < EXACT * true.norm()


def test_it_is_refused_at_the_start():
    own = ModelSpec(build_model(family_config("qwen3", **heads(2, 1))))
    check_rows(own)
    with (
        mock.patch.dict(AttentionInterface._global_mapping, {"sdpa": groups_by_the_module}),
        pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM: the program's own function under"),
    ):
        check_rows(own)


@pytest.mark.parametrize(("query", "kv", "sp_size", "share"), [(2, 1, 4, 1), (3, 3, 4, 1), (14, 14, 16, 16 / 14)])
def test_a_kept_output_is_planned_for_a_ranks_rows(query, kv, sp_size, share):
    model = build_model(family_config("qwen3", **heads(query, kv)))
    model.gradient_checkpointing_enable()
    one, many = (layer_sizes(ModelSpec(model.train()), 0, Chunks(), each) for each in (1, sp_size))
    assert (many.output_bytes, many.lse_bytes) == (one.output_bytes * share, one.lse_bytes * share)


@pytest.mark.parametrize(("query", "kv"), [(2, 2), (2, 1), (3, 3)])
def test_ranks_exchange_their_own_rows_and_no_more(query, kv, ranks4):
    D, rows, plan = 6, 5, HeadPlan(4, query, kv)
    q = [2 * D * len(share.heads) * sum(map(len, share.rows)) for share in plan.shares("q", rows)]
    qkv = [of_q + 2 * D * rows * 2 * len(plan.kv_heads_of(rank)) for rank, of_q in enumerate(q)]
    for rank, found in enumerate(ranks4.run(exchanged, query, kv, D)):
        others = sum(qkv) - qkv[rank]
        output = 3 * q[rank], sum(q) - q[rank]
        assert found == [(others, 3 * qkv[rank]), output, output[::-1], (3 * qkv[rank], others)]


def test_dropout_draws_the_same_in_blocks_of_keys(monkeypatch):
    """A block's masks are those of its keys' places in the sequence."""
    make, (h, k, S, D) = torch.Generator().manual_seed(0), (2, 1, 24, 8)
    x = [torch.randn(1, n, S, D, generator=make, dtype=torch.float64).requires_grad_() for n in (h, k, k)]
    do, found = torch.randn(1, h, S, D, generator=make, dtype=torch.float64), []
    kernel = TorchKernel(None, None, Dropout(0.3, 11, range(h)))
    for size in (S, 5):
        monkeypatch.setattr(row_attention, "KEY_BLOCK", size)
        o = row_attention._RowAttention.apply(*x, None, row_attention.RowCall([(0, S)], S, None, kernel, None))
        found.append([o, *torch.autograd.grad(o, x, do)])
    for whole, blocks in zip(*found, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=0, atol=1e-12)

"""Layers without attention over a split sequence: gated delta nets, Mamba, short convolutions.

That every family of them is exact at SP 2, test_families says, and test_parity that engines are; here are other SP
degrees, shards shorter than a convolution, packed documents, checkpoints, and what is refused. transformers runs them
in plain torch here; its kernels need a GPU, and functions with their signatures stand in for them where that is said.
"""

import copy
import importlib
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

from benchmarks.cells import build_model
from benchmarks.families import family_config
from benchmarks.ranks import RankError
from benchmarks.tally import Tally
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.ulysses import HeadToSeq
from deepspeed_alst.config.compatibility import check_world
from deepspeed_alst.config.schema import parse
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import ShardingConfig, shard_batch
from deepspeed_alst.errors import ConfigError, DataError, UnsupportedModelError
from deepspeed_alst.linear_attention import sharded_layers
from deepspeed_alst.linear_attention.exchange import prepend_halo, seq_to_head
from deepspeed_alst.linear_attention.layers import linear_layers
from deepspeed_alst.linear_attention.sharded_layers import ShardContext, convolution, delta_rule, mamba2_scan
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.verification.hf_support_checks import check_model
from tests import stand_ins
from tests.attention.test_cores import DOCUMENTS, document_by_document, packed_batch, split_step, worst
from tests.models import family_batch, split_and_whole, step_in_fp64
from tests.stand_ins import linear as kernels

EXACT = 1e-12


# --- exchanges


def exchanged_heads(num_heads: int, num_groups: int) -> None:
    """Each cell is ``1000*tensor + 100*position + head``, so that a failure names what went astray."""
    rank, P = dist.get_rank(), dist.get_world_size()
    plan, S = HeadPlan(P, num_heads, num_groups), 2 * P
    dtypes = (torch.float64, torch.bfloat16, torch.int32, torch.float16)
    heads, dims = (num_heads, num_groups, num_heads, num_groups), (3, 1, 2, 5)
    whole = [
        (1000 * index + 100 * torch.arange(S)[:, None, None] + torch.arange(H)[:, None]).expand(2, S, H, D).to(dtype)
        for index, (H, D, dtype) in enumerate(zip(heads, dims, dtypes, strict=True))
    ]
    mine = [x[:, 2 * rank : 2 * rank + 2] for x in whole]
    for x, got in zip(whole, seq_to_head(mine, plan, None), strict=True):
        copies = [1] * plan.heads_per_rank if x.shape[2] == num_heads else plan.kv_copies_of(rank)
        own = [head for head, number in zip(plan.split(x.shape[2])[rank], copies, strict=False) for _ in range(number)]
        assert torch.equal(got, x[:, :, own])
        if x.shape[2] == num_heads:
            assert torch.equal(HeadToSeq.apply(got.transpose(1, 2), 2, plan, None), x[:, 2 * rank : 2 * rank + 2])


@pytest.mark.parametrize(("num_heads", "num_groups"), [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3), (10, 2), (12, 6)])
def test_heads_of_every_dtype_travel(num_heads, num_groups, ranks4):
    ranks4.run(exchanged_heads, num_heads, num_groups)


def halo_and_its_gradient(length: int, width: int) -> None:
    rank, P = dist.get_rank(), dist.get_world_size()
    make = torch.Generator().manual_seed(1)
    whole_BCS = torch.randn(2, 3, length * P, generator=make, dtype=torch.float64, requires_grad=True)
    padded = torch.nn.functional.pad(whole_BCS, (width, 0))
    windows = [padded[..., r * length : (r + 1) * length + width] for r in range(P)]
    weights = [torch.randn(2, 3, length + width, generator=make, dtype=torch.float64) for _ in range(P)]
    sum((w * x).sum() for w, x in zip(weights, windows, strict=True)).backward()
    own = slice(rank * length, (rank + 1) * length)
    mine = whole_BCS.detach()[..., own].clone().requires_grad_()
    got = prepend_halo(mine, width, None)
    assert torch.equal(got, windows[rank]) and got.stride(1) == 1
    (weights[rank] * got).sum().backward()
    torch.testing.assert_close(mine.grad, whole_BCS.grad[..., own], rtol=0, atol=1e-14)


@pytest.mark.parametrize("length, width", [(5, 3), (3, 3), (2, 3), (1, 3), (1, 0)])
def test_a_shard_gets_the_tokens_before_it_from_as_many_ranks_as_it_takes(length, width, ranks4):
    ranks4.run(halo_and_its_gradient, length, width)


def traffic(function: str) -> list[list[tuple[str, int]]]:
    """In forward and backward, the collectives of one call and the bytes that this rank sends to others."""
    B, s, P = 2, 8, dist.get_world_size()
    tally, split = Tally(), ShardContext(None)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.rand(shape).to(dtype).requires_grad_()

    with tally.installed():
        with tally.phase("forward"):
            if function == "conv":
                conv = convolution(modeling_mamba2.causal_conv1d_fn, split)
                out = conv(random(B, 32, s), random(32, 4), activation="silu")
            elif function == "delta rule":
                rule = delta_rule(modeling_qwen3_next.torch_chunk_gated_delta_rule, split)
                q, k, v = random(B, s, P, 16), random(B, s, P, 16), random(B, s, 2 * P, 8)
                g, beta = random(B, s, 2 * P, dtype=torch.float32), random(B, s, 2 * P)
                out = rule(q, k, v, g=-g, beta=beta)[0]
            else:
                scan = mamba2_scan(modeling_mamba2.mamba2_chunk_scan, split)
                x, dt, A = random(B, s, 2 * P, 8), random(B, s, 2 * P), -random(2 * P)
                out = scan(x, dt, A, random(B, s, 1, 16), random(B, s, 1, 16), chunk_size=8)
        with tally.phase("backward"):
            out.sum().backward()
    return [[(each.name, each.sent) for each in tally.of(phase)] for phase in ("forward", "backward")]


_TOKENS = 2 * 8 * 3  # that a rank sends: to each of 3 others


@pytest.mark.parametrize(
    "function, sent",
    [
        # 3 tokens of 32 channels in bf16, to the next rank alone.
        ("conv", [2 * 3 * 32 * 2]),
        # A head of queries and keys, two of values and their steps in bf16; their decays in fp32.
        ("delta rule", [_TOKENS * 2 * (2 * 16 + 2 * 8 + 2), _TOKENS * 2 * 4, _TOKENS * 2 * 8 * 2]),
        # Two heads and their steps; B and C go to every rank. In plain torch the scan's output is fp32.
        ("scan", [_TOKENS * 2 * (2 * 8 + 2 + 2 * 16), _TOKENS * 2 * 8 * 4]),
    ],
)
def test_a_call_sends_each_head_once_and_a_convolution_its_last_tokens(function, sent, ranks4):
    forward, backward = ranks4.run(traffic, function)[1]
    assert forward == [("all_to_all_single", num_bytes) for num_bytes in sent]
    assert backward == forward[::-1]


# --- models


@pytest.mark.parametrize("length", [61, 5])
@pytest.mark.parametrize(
    "model_type, changed",
    [
        ("qwen3_next", {"linear_num_key_heads": 2, "num_experts": 0}),
        ("lfm2", {"conv_L_cache": 4}),
        ("bamba", {"mamba_n_groups": 2}),
        ("jamba", {}),
    ],
)
def test_four_ranks_are_exact_with_shared_heads_and_with_shards_shorter_than_a_convolution(
    model_type, changed, length, ranks4
):
    loss, grads = ranks4.run(split_and_whole, family_config(model_type, **changed), length, 2, 4)[0]
    assert loss < EXACT and max(grads.values()) < EXACT, max(grads, key=grads.get)


def errors_of_shards_taken_for_the_sequence(model_type: str) -> float:
    with mock.patch.object(sharded_layers, "shard_linear_layers", lambda *_: 0):
        return max(split_and_whole(family_config(model_type), 37, 1)[1].values())


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "bamba", "jamba"])
def test_these_numbers_see_a_shard_that_is_taken_for_the_sequence(model_type, ranks2):
    assert ranks2.run(errors_of_shards_taken_for_the_sequence, model_type)[0] > 0.01


def gradients(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of one split step, this rank's."""
    shard = shard_batch(batch, dist.get_world_size(), ShardingConfig(dist.get_world_size())).shards[dist.get_rank()]
    with PatchSet() as undo:
        patch_model(ModelSpec(model), None, undo)
        model(**shard, use_cache=False).loss.backward()
    return {name: param.grad for name, param in model.named_parameters()}


def same_gradients_with_checkpoints(model_type: str, reentrant: bool) -> bool:
    config, batch = family_config(model_type, num_experts=0), family_batch(37, 2)
    plain = gradients(build_model(config), batch)
    model = build_model(config).train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return all(torch.equal(grad, plain[name]) for name, grad in gradients(model, batch).items())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "falcon_h1"])
def test_checkpoints_change_no_bit(model_type, reentrant, ranks2):
    assert all(ranks2.run(same_gradients_with_checkpoints, model_type, reentrant))


# --- packed documents (test_cores has every family, in plain torch)


def errors_of_packing_with_kernels(model_type: str, changed: dict[str, Any]) -> tuple[float, set[str]]:
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config, batch = family_config(model_type, **changed), packed_batch()
    batch["seq_idx"] = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS)).int()[None]
    truth = document_by_document(config, batch, DOCUMENTS)
    with kernels.in_place_of_torch(modeling), stand_ins.installed():
        split = split_step("flash_attention_2", config, batch, dist.get_world_size(), 8)
    return worst(split, truth), set(kernels.CALLS)


@pytest.mark.parametrize(
    "model_type, called", [("qwen3_next", {"conv", "delta rule"}), ("bamba", {"conv", "scan"}), ("lfm2", {"conv"})]
)
def test_kernels_are_told_where_documents_end(model_type, called, ranks2):
    """Stand-ins, against each document alone in plain torch."""
    error, kernels_called = ranks2.run(errors_of_packing_with_kernels, model_type, {"num_experts": 0})[0]
    assert error < EXACT and kernels_called == called


def run_packed(model_type: str, batch: dict[str, Any]) -> None:
    with stand_ins.installed():
        split_step("flash_attention_2", family_config(model_type, num_experts=0), batch, 2, 8)


def test_packed_documents_without_seq_idx_are_refused(ranks2):
    """Without sequence parallelism transformers would let the convolution run on into the next document."""
    with pytest.raises(RankError) as caught:
        ranks2.run(run_packed, "qwen3_next", packed_batch())
    for error in caught.value.errors:
        assert isinstance(error, UnsupportedModelError)
        assert "packed documents without seq_idx" in str(error) and "return_seq_idx=True" in str(error)


def test_seq_idx_that_disagrees_with_the_positions_is_refused():
    batch = packed_batch()
    batch["seq_idx"] = torch.zeros_like(batch["input_ids"])
    with pytest.raises(DataError, match="seq_idx does not start a document at token 7 of row 0"):
        shard_batch(batch, 2, ShardingConfig(2, packing=True))
    del batch["position_ids"]
    batch["seq_idx"][:, 5:] = 1
    with pytest.raises(DataError, match="seq_idx starts a document at token 5 of row 0"):
        shard_batch(batch, 2, ShardingConfig(2))


# --- padding


def errors_with_padding(model_type: str) -> float:
    config, batch = family_config(model_type), family_batch(23, 2)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 9:] = 0
    batch["labels"][1, 9:] = -100
    loss, whole = step_in_fp64(config, batch)
    split_loss, split = step_in_fp64(config, batch, dist.group.WORLD)
    return worst((split_loss, split), (loss, whole))


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "granitemoehybrid", "mamba"])
def test_padding_changes_nothing(model_type, ranks2):
    assert ranks2.run(errors_with_padding, model_type)[0] < EXACT


# --- what is refused, and what goes round the split layers


@pytest.mark.parametrize(
    "model_type, changed, sentence",
    [
        ("minimax", {"num_local_experts": 4}, "layer_types has linear_attention"),
        ("recurrent_gemma", {"lru_width": 32}, "layer_types has linear_attention"),
        ("zaya", {}, "layer_types has hybrid"),
        ("rwkv", {"attention_hidden_size": 32}, "has neither sdpa nor flash nor flex attention"),
        ("xlstm", {"num_heads": 4, "num_blocks": 2}, "has neither sdpa nor flash nor flex attention"),
    ],
)
def test_another_kind_is_refused_by_name(model_type, changed, sentence):
    with pytest.raises(UnsupportedModelError, match=sentence):
        check_model(ModelSpec(build_model(family_config(model_type, **changed))))


class CallsElsewhere(modeling_qwen3_next.Qwen3NextGatedDeltaNet):
    """A user's layer around the one that is known."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states.flip(1), *args, **kwargs)


def test_layers_whose_code_is_not_known_are_refused_by_name():
    model = build_model(family_config("qwen3_next", num_experts=0))
    layer = model.model.layers[0].linear_attn
    layer.__class__ = CallsElsewhere
    with pytest.raises(UnsupportedModelError, match=r"\(CallsElsewhere\) calls .* outside of its forward"):
        check_model(ModelSpec(model))
    layer.__class__ = modeling_qwen3_next.Qwen3NextGatedDeltaNet
    check_model(ModelSpec(model))
    layer.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(
        UnsupportedModelError, match=r"\(Qwen3NextGatedDeltaNet\) has a forward that was set on the instance"
    ):
        check_model(ModelSpec(model))


@use_kernel_func_from_hub_with_fallback("another_scan", "nowhere")
def another_scan(x):
    """A kernel of tomorrow."""
    return x


class AnotherMixer(torch.nn.Module):
    """A layer of tomorrow."""

    def forward(self, hidden_states, **kwargs):
        """Of one token and those before it."""
        return another_scan(hidden_states)


def test_a_function_that_is_not_known_is_refused_by_name():
    model = build_model(family_config("qwen3_next", num_experts=0))
    model.model.layers[0].linear_attn = AnotherMixer()
    with pytest.raises(UnsupportedModelError, match=r"\(AnotherMixer\) calls another_scan, which is not verified"):
        check_model(ModelSpec(model))


@pytest.mark.parametrize(
    "model_type, changed, found",
    [
        ("qwen3_next", {"num_experts": 0, "linear_num_value_heads": 12}, (12, 4)),
        ("bamba", {"num_attention_heads": 16, "num_key_value_heads": 16}, (8, 2)),
    ],
)
def test_more_ranks_than_a_scan_has_heads_are_refused_with_the_degrees_that_work(model_type, changed, found):
    heads = check_model(ModelSpec(build_model(family_config(model_type, **changed))))
    assert [each for each in heads if each[2] == "scan"] == [(*found, "scan")]
    with pytest.raises(ConfigError) as caught:
        check_world(parse({"sequence_parallel_size": 16}), 16, [(*found, "scan")])
    assert f"sequence_parallel_size=16 exceeds the model's {found[0]} heads of a scan" in str(caught.value)
    assert "Use one of [1, 2, 4, 8];" in str(caught.value)


# Heads and their groups: 8 and 4 (delta nets) or 8 and 1 or 2 (Mamba 2); Mamba's are its channels.
@pytest.mark.parametrize("changed", [{}, {"linear_num_value_heads": 5, "linear_num_key_heads": 5}], ids=["8/4", "5/5"])
def test_a_delta_nets_unequal_heads_are_exact(changed, ranks3):
    config = family_config("qwen3_next", num_experts=0, **changed)
    loss, grads = ranks3.run(split_and_whole, config, 37, 2, 3)[0]
    assert loss < EXACT and max(grads.values()) < EXACT, max(grads, key=grads.get)


@pytest.mark.parametrize("model_type", ["bamba", "mamba2", "falcon_h1", "kimi_linear", "jamba", "falcon_mamba", "lfm2"])
def test_unequal_heads_of_other_layers_are_exact(model_type, ranks3):
    loss, grads = ranks3.run(split_and_whole, family_config(model_type), 37, 2, 3)[0]
    assert loss < EXACT and max(grads.values()) < EXACT, max(grads, key=grads.get)


def what_happens_around(model_type: str) -> tuple[bool, list[str]]:
    """Whether generation is what it was, before, inside and after; and what is said where a layer is used elsewhere."""
    model = build_model(family_config(model_type, num_experts=0)).eval()
    prompt = torch.arange(7)[None]

    def generated() -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)

    layer = next(iter(linear_layers(model).values()))
    before, forwards, said = generated(), vars(layer).copy(), []
    with PatchSet() as undo:
        patch_model(ModelSpec(model), None, undo)
        inside = generated()
        for call in (layer, copy.deepcopy(model)):
            try:
                call(torch.randn(1, 8, 32)) if call is layer else call(prompt)
            except UnsupportedModelError as error:
                said.append(str(error))
    same = torch.equal(before, inside) and torch.equal(before, generated()) and vars(layer).keys() == forwards.keys()
    return same, said


@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba2"])
def test_generation_copies_and_bare_layers_do_not_mix_sequences(model_type, ranks2):
    for same, (bare, copied) in ranks2.run(what_happens_around, model_type):
        assert same
        assert "was called outside of its causal language model" in bare
        assert "is a copy of one in a model under sequence parallelism" in copied or "part of another model" in copied


def compiled_gradients_are_the_same(model_type: str) -> float:
    config, batch = family_config(model_type, num_experts=0), family_batch(24, 1)
    plain = gradients(build_model(config), batch)
    model = build_model(config)
    for layer in model.base_model.layers:
        layer.compile(backend="aot_eager")
    compiled = gradients(model, batch)
    return max(float((compiled[name] - grad).norm() / grad.norm()) for name, grad in plain.items())


def test_compiled_layers_are_split_as_well(ranks2):
    assert ranks2.run(compiled_gradients_are_the_same, "bamba")[0] < 1e-5

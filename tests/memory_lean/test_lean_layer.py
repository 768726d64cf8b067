"""Layers in chunks give the loss and the gradients of the ordinary model, in fp64, on two and four ranks."""

import pytest

from benchmarks.families import FAMILIES, family_config
from deepspeed_alst.attention.hf_attention import TRIAL
from deepspeed_alst.config.schema import MemoryLeanConfig
from tests.models import family_batch, split_and_whole, step_in_fp64

EXACT = 1e-12
# 19 tokens of a shard: chunks of 8, 8 and 3, tiles of 3, 3 and 2.
LEAN = MemoryLeanConfig(chunk_tokens=8, tile_tokens=3, key_block=5)


@pytest.mark.parametrize("model_type", [*FAMILIES, "deepseek_v2", "glm4_moe"])
def test_a_family_is_exact_in_chunks(model_type, ranks2):
    loss, grads = ranks2.run(split_and_whole, family_config(model_type), 37, 2, 2, 0, 0, LEAN)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_routers_loss_is_exact_in_chunks(model_type, ranks2):
    routed = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    loss, grads = ranks2.run(split_and_whole, family_config(model_type, **routed), 37, 2, 2, 0, 3, LEAN)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


@pytest.mark.parametrize("sp_size", [2, 4])
def test_sinks_and_their_gradients_are_exact_in_chunks(sp_size, ranks4):
    """The reference is eager attention; on a GPU such a model has flash attention's kernels, which chunks replace."""
    config = family_config("gpt_oss", num_local_experts=4, sliding_window=6)
    loss, grads = ranks4.run(split_and_whole, config, 37, 2, sp_size, 0, 0, LEAN, TRIAL)[0]
    assert loss < EXACT and any("sinks" in name for name in grads)
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


def test_a_soft_cap_is_exact_in_chunks(ranks2):
    config = family_config("gemma2", sliding_window=6, attn_logit_softcapping=0.5)
    loss, grads = ranks2.run(split_and_whole, config, 37, 2, 2, 0, 0, LEAN, TRIAL)[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


def test_a_model_with_flex_attention_is_exact_in_chunks(ranks2):
    """Its ordinary path has no backward on CPU; the reference is sdpa."""
    config = family_config("mistral", sliding_window=6)
    loss, grads = ranks2.run(split_and_whole, config, 37, 2, 2, 0, 0, LEAN, "flex_attention")[0]
    assert loss < EXACT
    assert max(grads.values()) < EXACT, max(grads, key=grads.get)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "glm4", "mixtral"])
def test_a_family_is_exact_in_chunks_on_one_rank(model_type):
    whole_loss, whole = step_in_fp64(family_config(model_type), batch := family_batch(19, 2))
    loss, grads = step_in_fp64(family_config(model_type), batch, lean=LEAN)
    assert abs(loss - whole_loss) < EXACT * whole_loss and grads.keys() == whole.keys()
    for name, grad in grads.items():
        assert (grad - whole[name]).norm() <= EXACT * whole[name].norm(), name

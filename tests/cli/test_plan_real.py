"""What the plan measures on fake tensors, against a step of a DeepSpeed engine on real ones, at SP 1."""

import deepspeed
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.ranks import Ranks
from deepspeed_alst.cli.fake_layer import bytes_of
from deepspeed_alst.config.schema import parse
from deepspeed_alst.profiler.ledger import Ledger

TOKENS = 1600  # more than three chunks, not a multiple of one
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
ALST = {"liger_kernel": False, "tiled_mlp_compute": {"tile_tokens": 128}, "tiled_logits_loss": {"tile_tokens": 128}}
LEAN = {"memory_lean_layer": {"chunk_tokens": 512, "tile_tokens": 128, "key_block": 1024}}
OFFLOAD = {"activation_checkpoint_cpu_offload": True}


def config_of():
    return CONFIG_MAPPING["llama"](**SIZES, vocab_size=512, num_hidden_layers=2, max_position_embeddings=TOKENS)


def peak_of_an_engine(alst):
    """Return the peak of the second micro-step beside weights and gradients, on a rank."""
    model = AutoModelForCausalLM.from_config(config_of(), dtype=torch.bfloat16, attn_implementation="sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    keys = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 3, "alst": {**alst}}
    # The model is in bf16 already; DeepSpeed's bf16 would add fp32 gradients, which are states.
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), config=keys)
    ids = torch.arange(TOKENS).remainder(512)[None]
    batch = {"input_ids": ids, "position_ids": torch.arange(TOKENS)[None], "labels": ids}
    engine.backward(engine(**batch, use_cache=False).loss)  # sets up what stays
    with Ledger(model) as ledger:
        engine.backward(engine(**batch, use_cache=False).loss)
    return max(each.total - each.bytes["weights"] - each.bytes["gradients"] for each in ledger.timeline)


@pytest.fixture(scope="module")
def rank():
    with Ranks(1) as ranks:
        yield ranks


def test_a_measured_peak_is_that_of_a_real_step_within_a_tenth(rank):
    found = {}
    for name, alst in {"no tiles": {"liger_kernel": False}, "tiles": ALST, "chunks": {**ALST, **LEAN}}.items():
        (real,) = rank.run(peak_of_an_engine, alst)
        measured, _ = bytes_of(config_of(), parse({"alst": alst}), TOKENS)
        found[name] = max(measured.attention, measured.elsewhere, measured.outside)
        assert abs(found[name] / real - 1) < 0.1, f"{name}: measured {found[name]:,}, real {real:,}"
    # So that each of the three ran as it says.
    assert found["chunks"] < 0.8 * found["tiles"] < 0.8 * 0.8 * found["no tiles"]

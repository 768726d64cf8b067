"""Windows, chunks, packed documents and padding in memory-lean layers on one rank, against the plain model in fp64."""

import dataclasses
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import build_model, full_weight
from benchmarks.families import family_config
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.memory_lean import core
from tests.memory_lean.test_lean_behaviour import assert_close, lean_model
from tests.models import family_batch, step_in_fp64

EXACT = 1e-12
# 29 tokens: chunks of 8, 8, 8 and 5, tiles of 3, 3 and 2.
LEAN = MemoryLeanConfig(chunk_tokens=8, tile_tokens=3, key_block=5)
TOKENS = 29
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
CHUNKS = {"no_rope_layers": [1, 0], "interleave_moe_layer_step": 9, "attn_temperature_tuning": False}
MIXTURE = {"interleave_moe_layer_step": 1, "num_local_experts": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "window below a tile": ("mistral", {"sliding_window": 2}),
    "window below a chunk": ("mistral", {"sliding_window": 7}),
    "window above a chunk": ("mistral", {"sliding_window": 19}),
    "window of the sequence": ("mistral", {"sliding_window": TOKENS}),
    "some layers' window": ("gemma3_text", {"sliding_window": 11, **ALTERNATING}),
    "short chunks": ("llama4_text", {"attention_chunk_size": 5, **CHUNKS}),
    "long chunks": ("llama4_text", {"attention_chunk_size": 12, **CHUNKS}),
    "chunks, mixture": ("llama4_text", {"attention_chunk_size": 5, **CHUNKS, **MIXTURE}),
    "window, router's loss": (
        "mixtral",
        {"sliding_window": 7, "output_router_logits": True, "router_aux_loss_coef": 1.0},
    ),
    "causal": ("llama", {}),
}
PACKED = ((7, 1, 21), (12, 12, 5))


def batch_of(data: str) -> dict[str, torch.Tensor]:
    batch = family_batch(TOKENS, 2)
    if data.startswith("packed"):
        rows = PACKED if data == "packed" else PACKED[:1] * 2
        batch["position_ids"] = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])
    if data == "padded":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -5:] = 0
        batch["labels"][0, -5:] = -100
    return batch


def error(kind: str, data: str) -> float:
    """The largest relative error of the loss and of each gradient; a layer on the ordinary path raises."""
    model_type, changed = KINDS[kind]
    steps = [step_in_fp64(family_config(model_type, **changed), batch_of(data), lean=lean) for lean in (LEAN, None)]
    (loss, grads), (true_loss, true) = steps
    assert grads.keys() == true.keys()
    return max(abs(loss / true_loss - 1), *(float((grads[name] - x).norm() / x.norm()) for name, x in true.items()))


@pytest.mark.parametrize("data", ["plain", "packed", "packed alike", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_exact_in_chunks(kind, data):
    assert error(kind, data) < EXACT


@pytest.mark.parametrize(
    ("kind", "data", "change"),
    [
        ("window below a chunk", "plain", {"window": 6}),
        ("some layers' window", "packed alike", {"window": 12}),
        ("short chunks", "plain", {"chunk": 6}),
        ("causal", "packed alike", {"documents": (0, 7, 9, 29)}),
        ("causal", "packed", {"rows": (MaskSpec(documents=(0, 7, 8, 29)),) * 2}),
    ],
)
def test_a_mask_off_by_one_would_be_seen(kind, data, change):
    rectangles = core.Core.pieces

    def wrong(call: Any, chunk: slice) -> Any:
        changed = {name: value for name, value in change.items() if getattr(call.mask, name, None)}
        mask = call.mask and MaskSpec(**vars(call.mask) | changed)
        yield from rectangles(dataclasses.replace(call, mask=mask), chunk)

    with mock.patch.object(core.Core, "pieces", wrong):
        assert error(kind, data) > 1e-4


@pytest.mark.parametrize("data", ["left padding", "padding with labels", "padding without labels", "late chunks"])
def test_a_mask_that_chunks_cannot_have_is_ordinary_and_right(data):
    batch, (model_type, changed) = batch_of("plain"), KINDS["short chunks"]
    if data == "late chunks":  # of documents that start at position 3
        batch["position_ids"] = torch.cat([torch.arange(3, 13), torch.arange(3, 22)]).expand(2, -1)
    else:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, slice(5) if data == "left padding" else slice(-5, None)] = 0

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        labels = {} if data == "padding without labels" else {"labels": batch["labels"]}
        output = model(**{name: x for name, x in batch.items() if name != "labels"}, **labels, use_cache=False)
        (output.loss if labels else output.logits.square().mean()).backward()
        return {name: param.grad for name, param in model.named_parameters()}

    with (
        lean_model(model_type=model_type, **changed) as model,
        pytest.warns(UserWarning, match="a mask other than of a window"),
    ):
        found = gradients(model)
    assert_close(found, gradients(build_model(family_config(model_type, **changed)).train()))


def trained_weights() -> list[dict[str, torch.Tensor]]:
    """Weights after two steps on ZeRO 3, with every key of one GPU and without any, on packed samples of each rank."""
    import deepspeed

    found = []
    block = {"chunk_tokens": 8, "tile_tokens": 3, "key_block": 5}
    offload = {"activation_checkpoint_cpu_offload": {"keep_last": 0}, "save_attention_output": True}
    for alst in ({"memory_lean_layer": block, **offload}, None):
        model = build_model(family_config("mistral", sliding_window=11)).train()
        config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 3}}
        config |= {} if alst is None else {"alst": alst}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        zero = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config | zero)
        for step in range(2):
            batch = batch_of("packed") | family_batch(TOKENS, 2, seed=2 * step + dist.get_rank())
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="alst.memory_lean_layer")
                engine.backward(engine(**batch, use_cache=False).loss)
            engine.step()
        found.append({name: full_weight(param) for name, param in engine.module.named_parameters()})
        engine.destroy()
    return found


def test_packed_windows_train_by_keys_alone(ranks2):
    lean, plain = ranks2.run(trained_weights)[0]
    assert_close(lean, plain)

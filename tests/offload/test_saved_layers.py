"""Attention's output saved in as many layers as the host has room for: the bits of none and of all, on live engines."""

from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.cells import Cell, build_model, ds_config, model_config
from deepspeed_alst.memory_lean import core
from deepspeed_alst.offload import budget
from deepspeed_alst.offload import feature as offload_feature
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.budget import LayerSizes
from deepspeed_alst.offload.host_buffers import HostBufferPool
from tests.attention.test_kept_attention import Runs

LAYERS, ROWS, LONG, SHORT = 4, 2, 48, 32
CHUNKS = {"chunk_tokens": 10, "tile_tokens": 8, "key_block": 23}


def sizes(lean: bool) -> LayerSizes:
    """Those of the engine below: hidden size 32 and 4 heads in fp32."""
    chunks = {"num_lean_layers": LAYERS, "chunk_tokens": CHUNKS["chunk_tokens"] * ROWS, "num_norms": 1} if lean else {}
    return LayerSizes(LAYERS, int(not lean), 128, 128, 16, 0, 0, **chunks)


def engine_of(sp_size: int, lean: bool, saves: Any, host_budget: int | str) -> Any:
    import deepspeed

    config = model_config(Cell())
    config.num_hidden_layers = LAYERS
    model = build_model(config)
    model.activation_checkpointing_enable({"use_reentrant": sp_size == 2})
    alst = {"activation_checkpoint_cpu_offload": {"host_budget": host_budget}, "save_attention_output": saves}
    alst |= {"check_model": False, "memory_lean_layer": CHUNKS if lean else False, "pad_to_multiple_of": sp_size}
    keys = {**ds_config(Cell(stage=2), 1), "gradient_accumulation_steps": 2, "sequence_parallel_size": sp_size}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config={**keys, "alst": alst})[0]


def train(sp_size: int, lean: bool, saves: Any, host_budget: int | str) -> dict[str, Any]:
    """Two optimizer steps of two micro-steps, evaluated between all of them, the second step of longer sequences."""
    import deepspeed_alst

    make, said = torch.Generator().manual_seed(2), mock.Mock()
    found: dict[str, Any] = {"attention": [], "in use": [], "said": []}
    with (
        mock.patch.object(budget, "_FLOPS_PER_BYTE", 0),  # so small a layer would not hide the copy
        mock.patch.object(offload_feature, "print_report", said),
        mock.patch.object(core, "add_attention", wraps=core.add_attention) as in_chunks,
    ):
        engine = engine_of(sp_size, lean, saves, host_budget)
        for length in (SHORT, SHORT, LONG, LONG)[::sp_size]:
            ids = torch.randint(0, 97, (ROWS, length), generator=make)
            batch = {"input_ids": ids, "labels": ids}
            for part in [batch] if sp_size == 1 else deepspeed_alst.shard_dataloader([batch], engine):
                in_chunks.reset_mock()
                with Runs() as runs:
                    loss = engine(**part).loss
                    found["in use"].append(engine.alst_offload.pool.in_use)
                    engine.backward(loss)
                    engine.step()
                found["attention"].append(in_chunks.call_count if lean else runs.forwards)
                engine.module.eval()
                with torch.no_grad():
                    engine(**part)
                engine.module.train()
    found["said"] = [dict(call.args[0])["attention output"] for call in said.call_args_list]
    found["weights"] = [param.detach().clone() for param in engine.module.parameters()]
    engine.destroy()
    return found


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("sp_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_attention_runs_once_in_the_layers_that_the_host_has_room_for(sp_size, lean, ranks2):
    short, long = (ROWS * length // sp_size for length in (SHORT, LONG))
    room = sizes(lean).offloaded_bytes(long, 2)
    fitting = max(n for n in range(LAYERS + 1) if sizes(lean).offloaded_bytes(short, n) <= room)
    saved = [LAYERS if fitting == LAYERS - (not lean) else fitting] * 2 + [2, 2]
    cases = [False, "auto", True]
    none, some, every = (
        ranks2.run(train, sp_size, lean, each, 2 * room if each == "auto" else "auto") for each in cases
    )
    assert saved[0] > 2
    for of_none, of_some, of_all in zip(none, some, every, strict=True):
        once = [runs // LAYERS for runs in of_all["attention"]]
        assert min(once) > 0 and of_none["attention"] == [2 * LAYERS * each for each in once]
        assert of_some["attention"] == [(2 * LAYERS - n) * each for n, each in zip(saved, once, strict=True)]
        # The plan's bytes are the run's.
        planned = [sizes(lean).offloaded_bytes(*each) for each in zip([short, short, long, long], saved, strict=True)]
        assert of_some["in use"] == planned
        assert of_some["said"][-1].startswith("saved in the first 2 of 4 layers (auto: more exceeds")
        for weights in zip(of_none["weights"], of_some["weights"], of_all["weights"], strict=True):
            assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[1])


def test_an_output_that_does_not_come_ahead_comes_back_with_its_own_layers_input():
    store = ActivationStore(HostBufferPool(2**20))
    values, kept = [torch.full((1024,), float(value)) for value in range(4)], []
    for number in range(2):
        group = store.group()
        kept.append((group.put(values[2 * number], ahead=False), group.put(values[2 * number + 1])))
    store.release_copied()
    back: list[float] = []

    def request(tensor: Any) -> int:
        before = store.counts.bytes_back
        back.append(float(tensor().mean()))
        return (store.counts.bytes_back - before) // 4096

    # The second group's input, its output, and the first group's input; then the first group's output.
    assert [request(each) for each in (kept[1][1], kept[1][0], kept[0][1], kept[0][0])] == [3, 0, 1, 0]
    assert back == [3.0, 2.0, 1.0, 0.0]

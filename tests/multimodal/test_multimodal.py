"""Models of images and text train under sequence parallelism as without it."""

import deepspeed
import pytest
import torch
import torch.distributed as dist

import deepspeed_alst
from benchmarks.cells import Cell, ds_config, full_weight
from benchmarks.multimodal import ask
from benchmarks.multimodal_families import batch_of, tiny_model
from benchmarks.ranks import RankError
from deepspeed_alst.errors import UnsupportedModelError

RATE, GAS, WORLD = 0.02, 2, 2
STEPS = (((2, 1), (1,)), ((1, 2), (0, 1)))
"""Images of each row, of the batches of each step."""


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_loss_and_all_gradients_are_those_of_sp1(name, ranks2):
    verdicts = ranks2.run(ask, name)[0]
    assert [each.outcome for each in verdicts] == ["right"] * 3, verdicts
    assert max(each.error for each in verdicts) < 1e-12


def batches_of(name: str, model: torch.nn.Module, rank: int) -> list[dict]:
    found = []
    for step in STEPS:
        for images in step:
            batch = batch_of(name, model, images)
            batch["input_ids"][:, 3] += rank  # a text token: other samples on the other rank
            found.append(batch)
    return found


def train(name: str, stage: int, tiles: bool) -> dict:
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    model = tiny_model(name, torch.float32)
    own = batches_of(name, model, dist.get_rank())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), RATE),
        config=ds_config(Cell(stage=stage, gas=GAS, tiles=tiles), 2),
    )
    losses = []
    for batch in deepspeed_alst.shard_dataloader(own, engine):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {key: full_weight(param) for key, param in engine.module.named_parameters()}
    engine.eval()
    with torch.no_grad():
        output = engine(**own[dist.get_rank()])  # another batch on each rank
        logits = output.logits
    found = {"losses": losses, "weights": weights, "evaluated": float(output.loss), "logits": logits.float()}
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("name", "stage", "tiles"),
    [
        ("llava", 3, True),
        ("qwen2_5_vl", 2, False),
        *(
            pytest.param(name, stage, tiles, marks=pytest.mark.slow)
            for name in ("llava", "qwen3_vl", "gemma3")
            for stage, tiles in ((0, True), (1, False), (2, True), (3, False))
        ),
    ],
)
def test_steps_of_an_engine_are_those_of_sp1(name, stage, tiles, ranks2):
    found = ranks2.run(train, name, stage, tiles)
    model = tiny_model(name, torch.float32)
    own = [batches_of(name, model, rank) for rank in range(WORLD)]
    optimizer, losses = torch.optim.SGD(model.parameters(), RATE), []
    for step in range(len(STEPS)):
        for micro in range(GAS):
            for rank in range(WORLD):
                loss = model(**own[rank][step * GAS + micro]).loss
                losses.append(float(loss))
                (loss / (GAS * WORLD)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(losses, rel=1e-5)
    before = dict(tiny_model(name, torch.float32).named_parameters())
    for key, param in model.named_parameters():
        change = (param - before[key]).norm()
        assert (found[0]["weights"][key] - param).norm() <= 1e-3 * change + 1e-6 * param.norm() + 1e-6, key
    model.eval()
    for rank in range(WORLD):
        output = model(**own[rank][rank])
        assert found[rank]["evaluated"] == pytest.approx(float(output.loss), rel=1e-5)
        mask = own[rank][rank]["attention_mask"].bool()
        assert torch.allclose(found[rank]["logits"][mask], output.logits[mask], rtol=1e-3, atol=1e-4)

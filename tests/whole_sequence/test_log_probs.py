"""``log_probs`` in a plain loop: a preference loss of the program's own is that of SP 1, and of plain torch."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import deepspeed_alst
from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config
from benchmarks.ranks import RankError
from deepspeed_alst.errors import DataError
from deepspeed_alst.whole_sequence.batches import accept_whole_batches

RATE, STEPS, GAS, WORLD = 0.1, 2, 2, 2
WAYS = {"Z0": (0, False, True), "Z2": (2, True, False), "Z3": (3, True, True)}
"""ZeRO stage, padding on the left, tiles."""


def by_turns(names: Iterable[str]) -> Iterator[Any]:
    """Each name on ZeRO 2 or on ZeRO 3, by turns; the other ways are slow."""
    for number, (name, way) in enumerate(itertools.product(names, WAYS)):
        is_slow = way != ("Z2", "Z3")[number // len(WAYS) % 2]
        yield pytest.param(name, *WAYS[way], marks=[pytest.mark.slow] * is_slow, id=f"{name}-{way}")


def batch_of(step: int, micro: int, rank: int, left: bool) -> dict:
    """A chosen and a rejected row, of different lengths."""
    make = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    lengths = torch.randint(9, 24, (2,), generator=make)
    ids = torch.randint(1, 97, (2, int(lengths.max())), generator=make)
    places = torch.arange(ids.shape[1])
    mask = (places >= ids.shape[1] - lengths[:, None] if left else places < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def preference(numbers: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    chosen, rejected = (numbers - reference).sum(1)
    return -F.logsigmoid(0.3 * (chosen - rejected))


def plain(model: torch.nn.Module, batch: dict, temperature: float) -> torch.Tensor:
    logits = model(**batch, use_cache=False).logits[:, :-1].double() / temperature
    numbers = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    mask = batch["attention_mask"]
    return numbers * (mask[:, 1:] * mask[:, :-1])


def train(sp_size: int, stage: int, left: bool, tiles: bool, temperature: float) -> dict:
    model = build_model(model_config(Cell()))
    config = ds_config(Cell(stage=stage, gas=GAS, tiles=tiles), sp_size)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), RATE), config=config)
    rank = dist.get_rank()
    own = [batch_of(step, micro, rank, left) for step in range(STEPS) for micro in range(GAS)]
    losses, first = [], None
    for batch in deepspeed_alst.shard_dataloader(own, engine, whole=True):
        with torch.no_grad():
            reference = deepspeed_alst.log_probs(engine, batch, temperature)
        numbers = deepspeed_alst.log_probs(engine, batch, temperature)
        first = numbers.detach() if first is None else first
        loss = preference(numbers, 0.9 * reference)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {name: full_weight(param) for name, param in engine.module.named_parameters()}
    engine.destroy()
    return {"losses": losses, "weights": weights, "first": first}


@pytest.mark.parametrize(
    ("stage", "left", "tiles", "temperature"), [(0, False, True, 1.0), (2, True, True, 0.7), (3, True, False, 1.0)]
)
@pytest.mark.parametrize("sp_size", [1, 2])
def test_a_preference_loss_is_that_of_plain_torch(sp_size, stage, left, tiles, temperature, ranks2):
    found = ranks2.run(train, sp_size, stage, left, tiles, temperature)
    model = build_model(model_config(Cell()))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses = []
    for step in range(STEPS):
        for micro in range(GAS):
            for rank in range(WORLD):
                numbers = plain(model, batch_of(step, micro, rank, left), temperature)
                loss = preference(numbers, 0.9 * numbers.detach())
                if not losses:
                    assert (found[0]["first"] - numbers).norm() < 1e-5 * numbers.norm()
                losses.append(float(loss))
                (loss / (GAS * WORLD)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if sp_size == 2:
        assert found[0]["losses"] == found[1]["losses"] == pytest.approx(losses, rel=1e-4)
    for name, param in model.named_parameters():
        assert (found[0]["weights"][name] - param).norm() < 1e-5 * param.norm(), name


def different() -> None:
    model = build_model(model_config(Cell()))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), RATE), config=ds_config(Cell(stage=2), 2)
    )
    batch = batch_of(0, 0, dist.get_rank(), False)
    with torch.no_grad():  # of each rank's own batch
        numbers = deepspeed_alst.log_probs(engine, batch)
        assert numbers.shape == (2, batch["input_ids"].shape[1] - 1)
        with engine.alst.calls.unsplit(engine.module.config):
            torch.testing.assert_close(numbers, plain(engine.module, batch, 1.0).float(), rtol=1e-4, atol=1e-5)
    try:
        deepspeed_alst.log_probs(engine, batch)
    finally:
        engine.destroy()


def evaluate() -> None:
    model = build_model(model_config(Cell()))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(Cell(stage=2), 2))
    engine.eval()
    batch = batch_of(0, 0, dist.get_rank(), True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[batch["attention_mask"].cumsum(1) == 1] = -100
    with torch.no_grad(), accept_whole_batches(engine.alst):
        outputs = [model(**batch, labels=labels) for model in (engine, engine.module)]
        with engine.alst.calls.unsplit(engine.module.config):
            whole = engine.module(**batch, labels=labels)
    real = batch["attention_mask"] > 0
    for each in outputs:
        torch.testing.assert_close(each.loss, whole.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(each.logits[real], whole.logits[real], rtol=1e-4, atol=1e-5)
    engine.destroy()


def test_logits_of_whole_batches_with_padding_on_the_left_are_those_of_the_same_tokens(ranks2):
    ranks2.run(evaluate)


def test_ranks_with_different_batches_are_refused_in_training_alone(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(different)
    assert all(isinstance(each, DataError) and "not the same" in str(each) for each in caught.value.errors)

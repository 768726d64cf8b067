"""A loss that is no number: every rank stops before a weight changes, and says whose batch it was."""

import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config, samples
from deepspeed_alst.engine.finite import LossWatch
from deepspeed_alst.errors import NonFiniteLossError
from deepspeed_alst.parallel.groups import build_control_group, build_groups

POISON = 96  # a token whose embedding is no number


def weights_of(engine: Any) -> list[torch.Tensor]:
    return [full_weight(param).nan_to_num(1e9).clone() for param in engine.module.parameters()]


def steps_with_poison(
    cell: Cell, step: int, rank: int, number: int, as_trainer: bool = False
) -> tuple[str, str, int, bool, list[float]]:
    """Train; the batch of that step, rank and number has the token.

    With ``as_trainer`` batches are exchanged one by one, as for the HF Trainer. Returns the error's class and message,
    the steps taken, whether the weights are those before the last step, and the losses.
    """
    import deepspeed

    import deepspeed_alst

    config = model_config(cell)
    model = build_model(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(cell, cell.sp_size))[0]
    losses: list[float] = []
    try:
        for at, ranks in enumerate(samples(cell, POISON)):
            own = ranks[dist.get_rank()]
            if (at, dist.get_rank()) == (step, rank):
                own[number]["input_ids"][0, 5] = POISON
            before = weights_of(engine)
            try:
                sharded = deepspeed_alst.shard_dataloader(own, engine)
                for batch in itertools.chain(*map(engine.alst.exchange, own)) if as_trainer else sharded:
                    loss = engine(**batch).loss
                    losses.append(loss.item())
                    engine.backward(loss)
                    engine.step()
            except ValueError as error:
                same = all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
                return type(error).__name__, str(error), engine.global_steps, same, losses
            if at == step:
                same = all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
        return "", "", engine.global_steps, same, losses
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        (1, "bf16"),
        pytest.param(2, "fp32", marks=pytest.mark.slow),
        (3, "bf16"),
    ],
)
def test_every_rank_stops_before_the_step_with_the_rank_and_the_number_of_the_batch(ranks4, stage, dtype):
    cell = Cell(stage=stage, dtype=dtype, gas=2, world_size=4)
    results = ranks4.run(steps_with_poison, cell, 1, 3, 1)
    words = "the loss is nan in optimizer step 2, micro-step 4 of 4: rank 3's batch 1 of this epoch (counted from 0)"
    for rank, (kind, message, steps, same, losses) in enumerate(results):
        assert kind == "NonFiniteLossError", message
        # The other sequence's ranks learn of it from the first that saw it.
        assert message.startswith(words if rank > 1 else f"rank 2: {words}")
        assert (steps, same, len(losses)) == (1, True, 8)
        assert [math.isnan(loss) for loss in losses] == [False] * 7 + [rank > 1]


def test_under_fp16_deepspeed_skips_the_step_and_goes_on(ranks2):
    results = ranks2.run(steps_with_poison, Cell(stage=1, dtype="fp16"), 1, 0, 0)
    for kind, message, steps, same, losses in results:
        assert (kind, message, steps, same) == ("", "", 3, True)
        assert [math.isnan(loss) for loss in losses] == [False, False, True, False, False, False]


def test_of_batches_that_are_exchanged_one_by_one_the_rank_is_named(ranks2):
    for kind, message, steps, same, _ in ranks2.run(steps_with_poison, Cell(gas=2), 0, 1, 0, True):
        assert kind == "NonFiniteLossError" and (steps, same) == (0, True)
        assert "optimizer step 1, micro-step 2 of 4: a batch of rank 1." in message


def loss_of_one_rank_alone() -> tuple[str, int]:
    groups, steps = build_groups(1, build_control_group()), []
    engine = mock.Mock(global_steps=0, **{"fp16_enabled.return_value": False})
    watch = LossWatch(groups)
    watch.add(torch.tensor(math.nan if dist.get_rank() == 1 else 1.0))
    try:
        with pytest.raises(NonFiniteLossError) as raised:
            watch.before_step(engine, lambda: steps.append(1))()
    finally:
        groups.destroy()
    return str(raised.value), len(steps)


def test_a_loss_that_is_nan_on_one_rank_alone_stops_all(ranks2):
    results = ranks2.run(loss_of_one_rank_alone, seconds=60)
    assert all("the loss is nan in optimizer step 1" in said and steps == 0 for said, steps in results)
    assert results[0][0].startswith("rank 1: ")

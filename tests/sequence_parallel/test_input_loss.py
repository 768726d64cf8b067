"""NaN losses and gradients: all ranks drop the step whole, and say whose batch or which parameter it was."""

import itertools
import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, full_weight, model_config, samples
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.mesh import build_control_group, build_groups
from deepspeed_alst.errors import NonFiniteLossError
from deepspeed_alst.grad_reduction.checks import NonFiniteCheck
from tests.sequence_parallel.test_features import allow_fp16_on_cpu, forbid_fp16_on_cpu

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
                applied = engine.global_steps - engine.skipped_steps
                return type(error).__name__, str(error), applied, same, losses
            if at == step:
                same = all(torch.equal(a, b) for a, b in zip(before, weights_of(engine), strict=True))
        return "", "", engine.global_steps, same, losses
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
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
    ranks2.run(allow_fp16_on_cpu)
    results = ranks2.run(steps_with_poison, Cell(stage=1, dtype="fp16"), 1, 0, 0)
    ranks2.run(forbid_fp16_on_cpu)
    for kind, message, steps, same, losses in results:
        assert (kind, message, steps, same) == ("", "", 3, True)
        assert [math.isnan(loss) for loss in losses] == [False, False, True, False, False, False]


def test_of_batches_that_are_exchanged_one_by_one_the_rank_is_named(ranks2):
    for kind, message, steps, same, _ in ranks2.run(steps_with_poison, Cell(gas=2), 0, 1, 0, True):
        assert kind == "NonFiniteLossError" and (steps, same) == (0, True)
        assert "optimizer step 1, micro-step 2 of 4: a batch of rank 1." in message


def loss_of_one_rank_alone() -> tuple[str, bool]:
    groups, module = build_groups(1, build_control_group()), torch.nn.Linear(1, 1)
    optimizer, before = torch.optim.SGD(module.parameters(), lr=1.0), module.weight.item()
    module.weight.grad = torch.ones(1, 1)
    engine = mock.Mock(global_steps=0, module=module, optimizer=optimizer, fp16_enabled=lambda: False)
    try:
        with PatchSet() as patches:
            watch = NonFiniteCheck(groups, ForwardContext())
            watch.watch(engine, patches)
            watch.add(torch.tensor(math.nan if dist.get_rank() == 1 else 1.0))
            with pytest.raises(NonFiniteLossError) as raised, watch.step(engine):
                optimizer.step()
    finally:
        groups.destroy()
    return str(raised.value), module.weight.item() == before


def test_a_loss_that_is_nan_on_one_rank_alone_stops_all(ranks2):
    results = ranks2.run(loss_of_one_rank_alone, seconds=60)
    assert all("the loss is nan in optimizer step 1" in said and dropped for said, dropped in results)
    assert results[0][0].startswith("rank 1: ")


# --- training goes on after it


def weights_without(cell: Cell, cause: str, learned: bool) -> tuple[list[torch.Tensor], list[str], list[int]]:
    """Train three steps, of which the second has a NaN or, where ``learned`` is false, is left out.

    The last weights, the errors, and the steps and micro-steps that DeepSpeed has counted.
    """
    import deepspeed

    import deepspeed_alst

    model = build_model(model_config(cell))
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = math.nan
    poisoned = {"gradient": False}
    named = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
    named.register_hook(lambda grad: grad * math.nan if poisoned["gradient"] else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(cell, cell.sp_size))[0]
    errors = []
    for at, ranks in enumerate(samples(cell, POISON)):
        own = ranks[dist.get_rank()]
        if at == 1:
            if not learned:
                continue
            if cause == "loss" and dist.get_rank() == 1:
                own[0]["input_ids"][0, 5] = POISON
            poisoned["gradient"] = cause == "gradient" and dist.get_rank() == 1
        try:
            for batch in deepspeed_alst.shard_dataloader(own, engine):
                engine.backward(engine(**batch).loss)
                engine.step()
        except deepspeed_alst.NonFiniteLossError as error:
            errors.append(f"{type(error).__name__}: {error}")
        poisoned["gradient"] = False
    weights, counts = weights_of(engine), [engine.global_steps, engine.skipped_steps, engine.micro_steps]
    engine.destroy()
    return weights, errors, counts


NO_CHECK = (("bf16", {"enabled": True, "check_grad_overflow": False}),)
PATHS = {
    "zero0 fp32": Cell(stage=0),
    "zero0 bf16": Cell(stage=0, dtype="bf16"),
    "zero1 fp32 sums of bf16": Cell(stage=1, dtype="bf16", grad_accum="fp32"),
    "zero1 fp32, clipped": Cell(stage=1, clip=0.5),
    "zero2 bf16": Cell(stage=2, dtype="bf16", grad_accum="fp32"),
    "zero2 bf16, no check of its own": Cell(stage=2, dtype="bf16", extra=NO_CHECK),
    "zero2 fp32, offloaded": Cell(stage=2, offload_optimizer=True),
    "zero3 bf16": Cell(stage=3, dtype="bf16"),
    "zero3 fp32, offloaded": Cell(stage=3, offload_optimizer=True),
}


IN_SHORT = ("zero0 fp32", "zero2 bf16, no check of its own", "zero3 bf16")


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] if path not in IN_SHORT else []) for path in PATHS]
)
def test_training_goes_on_as_if_the_batches_of_the_step_had_not_been_there(path, ranks2):
    cell = replace(PATHS[path], gas=2)
    expected = ranks2.run(weights_without, cell, "", False)
    for cause, words in {
        "loss": "NonFiniteLossError: the loss is nan in optimizer step 2, micro-step 2 of 4",
        "gradient": "NonFiniteGradientError: the gradient of model.layers.1.mlp.up_proj.weight is NaN",
    }.items():
        results = ranks2.run(weights_without, cell, cause, True)
        for (weights, errors, counts), (right, _, _) in zip(results, expected, strict=True):
            assert len(errors) == 1 and words in errors[0]
            assert counts == [3, 1, 12]
            assert all(torch.equal(a, b) for a, b in zip(weights, right, strict=True))

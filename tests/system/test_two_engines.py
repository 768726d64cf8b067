"""A policy at SP 2 and a reference at SP 1 in one process: each equals itself alone, to the bit."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, model_config, samples

CELL = Cell(stage=2, gas=1)


def _engine(hf_config: Any, sp_size: int, stage: int) -> Any:
    import deepspeed

    model = build_model(hf_config, seed=sp_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    config = ds_config(Cell(stage=stage), sp_size)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def _steps(engine: Any) -> Any:
    """Train three steps, a yield after each micro-step."""
    import deepspeed_alst

    for ranks in samples(CELL, model_config(CELL).vocab_size):
        own = ranks[dist.get_rank()]
        for batch in deepspeed_alst.shard_dataloader(own, engine):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            yield loss.item()


def _weights(engine: Any) -> list[torch.Tensor]:
    from benchmarks.cells import full_weight

    return [full_weight(param) for param in engine.module.parameters()]


def train(order: tuple[int, ...], stage: int, interleaved: bool) -> dict[int, Any]:
    """Build an engine for each SP degree in this order, from one config object; losses and weights of each."""
    hf_config = model_config(CELL)
    engines = {sp_size: _engine(hf_config, sp_size, stage) for sp_size in order}
    losses: dict[int, list[float]] = {sp_size: [] for sp_size in order}
    steps = {sp_size: _steps(engine) for sp_size, engine in engines.items()}
    if interleaved:
        for row in itertools.zip_longest(*steps.values()):
            for sp_size, loss in zip(order, row, strict=True):
                losses[sp_size] += [] if loss is None else [loss]
    else:
        for sp_size in order:
            losses[sp_size] = list(steps[sp_size])
    results = {sp_size: (losses[sp_size], _weights(engine)) for sp_size, engine in engines.items()}
    for engine in engines.values():
        engine.destroy()
    return results


QUICK = (((2, 1), True, 3), ((2, 1), False, 2))


@pytest.mark.parametrize(
    ("order", "interleaved", "stage"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] * (each not in QUICK))
        for each in itertools.product(((2, 1), (1, 2)), (True, False), (2, 3))
    ],
)
def test_policy_and_reference_do_not_touch_each_other(order, interleaved, stage, ranks2):
    together = ranks2.run(train, order, stage, interleaved)
    for sp_size in order:
        alone = ranks2.run(train, (sp_size,), stage, False)
        for rank in range(2):
            losses, weights = together[rank][sp_size]
            alone_losses, alone_weights = alone[rank][sp_size]
            assert losses == alone_losses
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights, alone_weights, strict=True))


def interfaces_and_mpu() -> tuple[set[str], set[str], Any, str]:
    """What is global, before and after an engine's life."""
    from deepspeed.utils import groups
    from transformers import AttentionInterface, AttentionMaskInterface

    hf_config = model_config(CELL)
    before = set(AttentionInterface._global_mapping) | set(AttentionMaskInterface._global_mapping)
    engine = _engine(hf_config, 2, 2)
    during = set(AttentionInterface._global_mapping) & set(AttentionMaskInterface._global_mapping)
    mpu_outside = groups.mpu
    name = engine.module.config._attn_implementation
    model = engine.module
    engine.destroy()
    after = set(AttentionInterface._global_mapping) | set(AttentionMaskInterface._global_mapping)
    assert name in during and hf_config._attn_implementation is not name
    assert model.config._attn_implementation == "sdpa" and "_loss_function" not in vars(model)
    assert not model._forward_pre_hooks or all("guard" not in h.__qualname__ for h in model._forward_pre_hooks.values())
    return before, after, mpu_outside, name


def test_nothing_stays_behind(ranks2):
    for before, after, mpu_outside, _ in ranks2.run(interfaces_and_mpu):
        assert before == after
        assert mpu_outside is None

"""Frozen parts: the rest trains as without sequence parallelism, and what is frozen stays as it is, to the bit."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, model_config, samples, trained, vary
from benchmarks.parity import measure


def slow(cell: Cell) -> Any:
    return pytest.param(cell, marks=pytest.mark.slow)


CELLS = [
    Cell(stage=0, frozen="all but norms"),
    slow(Cell(stage=1, frozen="embedding", checkpointing="non-reentrant")),
    Cell(stage=2, frozen="all but lm_head"),
    slow(Cell(stage=3, frozen="layer 0", gas=2, clip=0.5)),
    Cell(stage=3, frozen="layer 1", gas=2, odd_lengths=True),
    # The first tiled MLP's input needs no gradient.
    Cell(stage=3, frozen="layer 0", gas=2, tiles=True),
    slow(Cell(stage=3, frozen="embedding", checkpointing="non-reentrant", tiles=True)),
    Cell(stage=3, frozen="all but norms", dtype="bf16"),
]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name())
def test_the_rest_trains_as_without_sequence_parallelism(cell, ranks2):
    row = measure(cell, ranks2, with_upstream=False)
    assert not isinstance(row.sp1, str), row.sp1
    assert not row.problems()


def moved(cell: Cell) -> tuple[set[str], set[str]]:
    """The names of the weights that an optimizer step changed, and of those that train."""
    import deepspeed

    import deepspeed_alst

    model = vary(build_model(model_config(cell)), cell.lora, cell.frozen)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.5)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(cell, cell.sp_size))[0]
    for batch in deepspeed_alst.shard_dataloader(samples(cell, 97)[0][dist.get_rank()], engine):
        engine.backward(engine(**batch).loss)
        engine.step()
    changed = set()
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=cell.stage == 3):
            if not torch.equal(param.detach(), before[name]):
                changed.add(name)
    names = set(trained(engine.module))
    engine.destroy()
    return changed, names


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("what", [{"frozen": "layer 0"}, {"lora": True}])
def test_frozen_weights_stay_as_they_are(what, stage, ranks2):
    for changed, names in ranks2.run(moved, Cell(stage=stage, **what)):
        assert changed == names and names

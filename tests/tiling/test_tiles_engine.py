"""Tiles by keys alone in DeepSpeed's engine: with and without sequence parallelism, ZeRO 0 to 3."""

import itertools
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cells import Cell, build_model, ds_config, model_config, run_sp1, samples
from benchmarks.families import family_config
from benchmarks.ranks import RankError
from deepspeed_alst.errors import DataError, UnsupportedModelError

TILES = {"tiled_mlp_compute": {"tile_tokens": 7}, "tiled_logits_loss": {"tile_tokens": 5}}


def worst_errors(cell: Cell, tiles: dict[str, Any]) -> tuple[float, float, float]:
    """Of loss, gradients and changes of three steps at SP 1, tiled against whole."""
    whole = run_sp1(cell)
    tiled = run_sp1(Cell(**{**vars(cell), "extra": (("alst", tiles),)}))
    worst = [
        max([((theirs[name] - ours).norm() / ours.norm()).item() for name, ours in own.items()], default=0.0)
        for own, theirs in ((whole.grads, tiled.grads), (whole.changes, tiled.changes))
    ]
    return abs(tiled.loss - whole.loss), *worst


QUICK = ((0, "non-reentrant"), (1, "reentrant"), (2, ""), (3, "non-reentrant"))


@pytest.mark.parametrize(
    ("stage", "checkpointing"),
    [
        pytest.param(*each, marks=[pytest.mark.slow] * (each not in QUICK))
        for each in itertools.product((0, 1, 2, 3), ("", "reentrant", "non-reentrant"))
    ],
)
def test_without_sequence_parallelism_a_step_in_tiles_is_that_of_the_whole(stage, checkpointing, ranks2):
    cell = Cell(stage=stage, gas=2, clip=0.5, odd_lengths=True, unequal_labels=True, checkpointing=checkpointing)
    loss, grads, changes = ranks2.run(worst_errors, cell, TILES)[0]
    assert loss < 1e-6 and 0 < grads < 2e-6 and 0 < changes < 2e-5


def test_one_process_alone_needs_no_launcher_for_tiles(ranks2):
    # The second rank's result is empty; both train by themselves, which is what SP 1 is.
    assert ranks2.run(worst_errors, Cell(stage=2), TILES)[1] == (pytest.approx(0, abs=1e-6), 0.0, 0.0)


def losses_by_dtype() -> tuple[list[float], str]:
    """At SP 1: the tiled loss of the same labels in several dtypes, and the words of the error about a float's."""
    import deepspeed

    model = build_model(model_config(Cell()))
    keys = {**ds_config(Cell(), 1), "alst": {"tiled_logits_loss": {"tile_tokens": 5}}}
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=keys)[0]
    ids = torch.arange(12).reshape(2, 6)
    try:
        losses = [
            engine(input_ids=ids, labels=ids.to(dtype)).loss.item() for dtype in (torch.int64, torch.int32, torch.uint8)
        ]
        with pytest.raises(DataError) as caught:
            engine(input_ids=ids, labels=ids.float())
        return losses, str(caught.value)
    finally:
        engine.destroy()


def test_without_sequence_parallelism_too_labels_are_whole_numbers_of_any_dtype(ranks2):
    losses, words = ranks2.run(losses_by_dtype)[0]
    assert len(set(losses)) == 1 and words.startswith("labels has dtype torch.float32, and must have integers")


class Gathers(TorchDispatchMode):
    """Counts all-gathers and what they bring."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in func.name() or "all_gather" in func.name()
        return func(*args, **(kwargs or {}))


def gathers_in_a_step(tile_tokens: int | None, checkpointing: bool) -> int:
    """All-gathers of one micro-step under ZeRO-3, once its trace is known."""
    import deepspeed

    import deepspeed_alst

    cell = Cell(stage=3)
    model = build_model(model_config(cell)).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    config = ds_config(cell, 2)
    config["zero_optimization"] |= {"stage3_prefetch_bucket_size": 0}
    tiles = {"tiled_mlp_compute": {"tile_tokens": tile_tokens}, "tiled_logits_loss": {"tile_tokens": tile_tokens}}
    config["alst"] |= tiles if tile_tokens else {"tiled_logits_loss": False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    counts = []
    for batches in samples(cell, 97):
        for batch in deepspeed_alst.shard_dataloader(batches[dist.get_rank()], engine):
            with Gathers() as gathers:
                engine.backward(engine(**batch).loss)
            engine.step()
            counts.append(gathers.count)
    engine.destroy()
    return counts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_gathered_as_often_for_64_tiles_as_for_one(checkpointing, ranks2):
    # Shards of 24 tokens: one tile, 4 tiles, 24 tiles.
    counts = [ranks2.run(gathers_in_a_step, tiles, checkpointing)[0] for tiles in (24, 6, 1, None)]
    assert counts[0] == counts[1] == counts[2] and 0 < counts[0] <= counts[3]


def shared_mlp() -> None:
    import deepspeed

    model = build_model(model_config(Cell()))
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    config = ds_config(Cell(stage=3), 1) | {"alst": TILES}
    deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config)


def test_a_weight_that_two_tiled_modules_share_is_refused_under_zero_3(ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(shared_mlp)
    assert all(isinstance(error, UnsupportedModelError) for error in caught.value.errors)
    assert all("model.layers.1.mlp.up_proj.weight" in str(error) for error in caught.value.errors)


def mixture(sp_size: int, stage: int, tiles: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The gradients of a mixture's step."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    import deepspeed_alst

    config = ds_config(Cell(stage=stage), sp_size)
    config["alst"] = {**config.get("alst", {}), **tiles}
    model = build_model(family_config("qwen3_moe"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    for batch in deepspeed_alst.shard_dataloader(samples(Cell(), 97)[0][dist.get_rank()], engine):
        engine.backward(engine(**batch).loss)
        if engine.is_gradient_accumulation_boundary():
            grads = {name: safe_get_full_grad(param).clone() for name, param in engine.module.named_parameters()}
        engine.step()
    engine.destroy()
    return grads


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_mixture_in_tiles(stage, ranks2):
    whole = ranks2.run(mixture, 1, stage, {})[0]
    tiled = ranks2.run(mixture, 2, stage, TILES)[0]
    for name, grad in whole.items():
        assert (tiled[name] - grad).norm() <= 3e-6 * grad.norm(), name


def evaluated(sp_size: int, tiles: dict[str, Any]) -> dict[str, float]:
    """A Trainer's metrics of its logits, after a step."""
    from tests.integrations.test_trainer import documents, make_trainer

    def metrics(predicted: Any) -> dict[str, float]:
        return {"sum": float(predicted.predictions.sum()), "shape": float(predicted.predictions.size)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = {"compute_metrics": metrics, "eval_dataset": documents(4)}
        trainer = make_trainer(sp_size, folder, trainer_arguments=arguments, max_steps=1, config={"alst": tiles})
        trainer.train()
        found = trainer.evaluate()
        trainer.model_wrapped.destroy()
    return {name: found[f"eval_{name}"] for name in ("loss", "sum", "shape")}


def test_a_trainers_evaluation_gets_its_logits(ranks2):
    expected = ranks2.run(evaluated, 1, {"tiled_logits_loss": False})[0]
    for sp_size in (1, 2):
        found = ranks2.run(evaluated, sp_size, {"tiled_logits_loss": {"tile_tokens": 5}})[0]
        assert found == pytest.approx(expected, rel=1e-4)

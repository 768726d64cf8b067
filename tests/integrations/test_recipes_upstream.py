"""Programs written for DeepSpeed's own ALST land on this package's code, are right, and leave nothing behind."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, model_config, run_alst, run_sp1, run_truth
from benchmarks.parity import errors, missed
from benchmarks.ranks import RankError
from tests import upstream_programs as programs

CELL = Cell(stage=2, gas=2, unequal_labels=True)


_truths = {}
_yardsticks = {}


def judged(program, cell, ranks, *args):
    """A program's errors against fp64, and those of the run without SP: loss, norm, each gradient, three SGD steps."""
    data = replace(cell, stage=2)  # ZeRO's stage changes neither the truth nor what rounding costs
    if data not in _truths:
        _truths[data] = run_truth(data)
        _yardsticks[data] = errors(ranks.run(run_sp1, data)[0], _truths[data])
    result = ranks.run(program, cell, *args)[0]
    assert result.grads.keys() == _truths[data].grads.keys()
    return errors(result, _truths[data]), _yardsticks[data]


def problems(program, cell, ranks, *args):
    """Where a program errs more than twice as much as the run without SP."""
    return missed(*judged(program, cell, ranks, *args))


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_the_loop_of_deepspeeds_tutorial_is_right(stage, ranks2):
    assert problems(programs.tutorial, replace(CELL, stage=stage), ranks2) == []


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_the_loop_of_accelerates_guide_is_right(stage, ranks2):
    assert problems(programs.accelerate_loop, replace(CELL, stage=stage), ranks2) == []


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_the_hf_trainer_is_right(stage, ranks2):
    assert problems(programs.hf_trainer, replace(CELL, stage=stage), ranks2) == []


def evaluated(trainer):
    """The evaluation's loss, and that of a plain model with the same weights, on samples as long as one another."""
    make = torch.Generator().manual_seed(11)
    rows = torch.randint(0, 97, (4, 40), generator=make)
    found = trainer.evaluate([{"input_ids": row, "labels": row} for row in rows])["eval_loss"]
    plain = build_model(model_config(CELL))
    plain.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        return found, sum(plain(input_ids=row[None], labels=row[None]).loss.item() for row in rows) / len(rows)


def evaluation_in_the_recipe(cell):
    return programs.hf_trainer(cell, then=evaluated)


def test_the_hf_trainers_evaluation_in_the_recipe_is_that_of_the_whole(ranks2):
    found, expected = ranks2.run(evaluation_in_the_recipe, replace(CELL, stage=2))[0]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_four_ranks_are_two_replicas(ranks4):
    cell = Cell(stage=3, unequal_labels=True, world_size=4)
    assert problems(programs.tutorial, cell, ranks4) == []


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2)), 3])
def test_tiles_that_do_not_divide_a_shard_are_right(stage, ranks2):
    """24 tokens in 7 tiles are 6 of 4 tokens: DeepSpeed's own stops at the step, as it waits for a seventh."""
    cell = replace(CELL, stage=stage, checkpointing="non-reentrant")
    assert problems(programs.tiled_tutorial, cell, ranks2, 7) == []


def test_the_lm_heads_gradient_is_right_where_deepspeeds_is_not(ranks2):
    """DeepSpeed's own lacks what comes behind the tiles: the number of labels, 1/4 for the gradient accumulation."""
    cell = replace(CELL, stage=3)  # where DeepSpeed is right elsewhere
    upstream, _ = judged(programs.tiled_tutorial, cell, ranks2, 4, False)
    assert upstream.grads.pop("lm_head.weight") > 3
    assert max(upstream.grads.values()) < 1e-5
    assert problems(programs.tiled_tutorial, cell, ranks2, 4) == []


# --- the loss that DeepSpeed puts into a model


def with_chunked_loss(cell, run):
    """A cell of a program that calls DeepSpeed's ``install_chunked_causal_lm_loss``; whether its loss is back after."""
    from deepspeed.runtime.chunked_cross_entropy import install_chunked_causal_lm_loss

    models = []

    def install(model):
        models.append((model, install_chunked_causal_lm_loss(model)))
        return model

    result = run(cell, on_model=install)
    ((model, loss),) = models
    return result, model.loss_function is loss


@pytest.mark.parametrize("tiles", [False, True])
def test_deepspeeds_chunked_loss_is_taken_over_and_given_back(tiles, ranks2):
    cell = replace(CELL, tiles=tiles)
    truth = run_truth(cell)
    (sp1, _), (sp2, given_back) = (ranks2.run(with_chunked_loss, cell, run)[0] for run in (run_sp1, run_alst))
    assert missed(errors(sp2, truth), errors(sp1, truth)) == [] and given_back


# --- without the block


def test_without_an_alst_block_deepspeed_is_left_alone(ranks2):
    """Its own factor is there to be seen: at stage 2 every gradient is SP times too large."""
    cell = Cell(stage=2)  # labels in every shard: without any, DeepSpeed's loss is NaN
    upstream, _ = judged(programs.tutorial, cell, ranks2, programs.shard_loss, False)
    assert all(error == pytest.approx(1.0, rel=1e-4) for error in upstream.grads.values())
    assert ranks2.run(what_is_patched_without_the_block) == [(True, False, False)] * 2


def what_is_patched_without_the_block():
    with programs.forgotten(), Engine(alst=False) as engine:
        patched = {"apply", "__getattr__"} & {name for cls in upstream_classes() for name in vars(cls)}
        return core_of_sdpa().__qualname__.endswith("uattn_wrapper"), bool(patched), hasattr(engine, "alst")


# --- what is there while an engine lives, and what stays behind


class Engine:
    """An engine as the tutorial makes it, for the length of a ``with``."""

    def __init__(self, alst=True, cell=CELL, **changed):
        import deepspeed

        self._model = programs.model_of(cell)
        mpu = programs.registered(cell, self._model)
        config = {**programs.config_of(cell, alst), **changed}
        optimizer = programs.sgd(self._model, cell)
        self._engine = deepspeed.initialize(model=self._model, optimizer=optimizer, config=config, mpu=mpu)[0]

    def __enter__(self):
        return self._engine

    def __exit__(self, *exc):
        self._engine.destroy()


def upstream_classes():
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    return ulysses_sp.UlyssesSPDataLoaderAdapter, ulysses_sp.TiledMLP, ulysses_sp.TiledFusedLogitsLoss


def core_of_sdpa():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def everything_global():
    """What recipes and this package change outside of an engine and a model."""
    import accelerate
    import transformers.trainer
    from deepspeed.utils import groups
    from transformers import AttentionInterface, AttentionMaskInterface

    return (
        [dict(vars(cls)) for cls in upstream_classes()],
        core_of_sdpa(),
        groups.mpu,
        set(AttentionInterface._global_mapping) | set(AttentionMaskInterface._global_mapping),
        accelerate.skip_first_batches,
        transformers.trainer.skip_first_batches,
    )


def other_models_and_the_programs_questions():
    """During: another model has its true core back, and DeepSpeed answers the real degree. After: all as before."""
    import accelerate
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups

    other, ids = build_model(model_config(CELL), seed=5), torch.arange(9)[None]
    true_core, logits = core_of_sdpa(), other(input_ids=ids).logits
    own_skip = accelerate.skip_first_batches
    with programs.forgotten():
        with Engine() as engine:
            assert core_of_sdpa() is true_core
            assert torch.equal(other(input_ids=ids).logits, logits)
            assert groups._get_sequence_parallel_world_size() == engine.alst.groups.sp_size == 2
            assert groups._get_sequence_parallel_rank() == dist.get_rank()
            assert engine.train_batch_size() == CELL.gas * CELL.sp_size
            assert accelerate.skip_first_batches is not own_skip
            during = everything_global()
        # As it was when deepspeed.initialize was called: with DeepSpeed's wrapper.
        after = everything_global()
        assert after[1].__qualname__.endswith("uattn_wrapper")
        # A second one, over the groups that are there.
        again = Engine.__new__(Engine)
        again._engine = second_engine(parallel_state_sp)
        with again as engine:
            batch = next(programs.adapter_for(programs.own_samples(CELL), engine))
            loss = programs.shard_loss(engine, batch, None)
        assert everything_global() == after
    return float(loss.detach()), during[0] != after[0]


def second_engine(mpu, **changed):
    import deepspeed

    model = programs.model_of(CELL)
    config = {**programs.config_of(CELL), **changed}
    return deepspeed.initialize(model=model, optimizer=programs.sgd(model, CELL), config=config, mpu=mpu)[0]


def test_other_models_are_spared_and_nothing_stays_behind(ranks2):
    (first, patched), (without_labels, _) = ranks2.run(other_models_and_the_programs_questions)
    assert patched and first > 1 and without_labels == 0


# --- the loader


def epochs_and_resumption():
    """An adapter is a DataLoader: epochs, an epoch broken off, its inner loader's names, and resuming within one."""
    import accelerate
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    def ids(batches):
        return [batch["input_ids"].tolist() for batch in batches]

    with programs.accelerates_state_forgotten(), Engine() as engine:
        adapter = programs.adapter_for(programs.own_samples(CELL), engine)
        batches = list(adapter)
        first = ids(batches)
        assert len(first) == len(adapter) == 3 * CELL.gas * CELL.sp_size
        assert all(set(batch) == {"input_ids", "position_ids", "shift_labels"} for batch in batches)
        next(adapter)
        assert ids([next(adapter)]) == first[1:2]
        assert ids(adapter) == first
        assert len(adapter.dataset) == 3 * CELL.gas and adapter.batch_size == 1
        assert not hasattr(adapter, "no_such_name")
        rest = accelerate.skip_first_batches(adapter, 5)
        assert isinstance(rest, UlyssesSPDataLoaderAdapter)
        return ids(rest) == first[5:]


def test_adapters_go_through_epochs_and_are_resumed_within_one(ranks2):
    assert ranks2.run(epochs_and_resumption) == [True, True]


def resumed_within_an_epoch(cell):
    """Final weights of the HF Trainer, run through and resumed after the second of three steps."""
    through = programs.hf_trainer(cell, save_strategy="steps", save_steps=2, output_dir="resumed")
    dist.barrier()
    resumed = programs.hf_trainer(cell, resume_from="resumed/checkpoint-2", output_dir="resumed")
    return [{name: run.before[name] + run.changes[name] for name in run.changes} for run in (through, resumed)]


def test_the_hf_trainer_resumes_within_an_epoch(ranks2):
    """DeepSpeed's own adapter has no dataset there."""
    through, resumed = ranks2.run(resumed_within_an_epoch, replace(CELL, gas=1))[0]
    assert through and through.keys() == resumed.keys()
    assert all(torch.equal(through[name], resumed[name]) for name in through)


# --- what is refused


def misuse(case):
    """Programs that DeepSpeed lets through, or that ask for what cannot be."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    with programs.forgotten():
        if case == "not registered":
            second_engine(parallel_state_sp)
        if case == "another size":
            Engine(sequence_parallel_size=1)
        if case == "another mpu":
            programs.registered(CELL, build_model(model_config(CELL)))
            second_engine(type("Megatron", (), {"initialize_sequence_parallel": None})(), sequence_parallel_size=2)
        with Engine() as engine:
            if case == "two engines":
                second_engine(parallel_state_sp)
            for batch in programs.adapter_for(programs.own_samples(CELL), engine):
                loss = programs.shard_loss(engine, batch, None)
                if case == "lost gradient":
                    labels = (batch["shift_labels"] != -100).sum()
                    totals = torch.stack([loss.detach() * labels, labels])
                    dist.all_reduce(totals)
                    # What a plain all_reduce on the loss makes: the sum's value, this shard's gradient.
                    loss = (loss * labels - (loss * labels).detach() + totals[0]) / totals[1]
                elif case == "direct backward":
                    loss.backward()
                engine.backward(loss)
                engine.step()


@pytest.mark.parametrize(
    "case, kind, sentence",
    [
        ("not aggregated", "SetupError", "the losses differ"),
        ("lost gradient", "SetupError", "its gradient is 2 times too small"),
        ("direct backward", "SetupError", "call engine.backward(loss), not loss.backward()"),
        ("two engines", "SetupError", "Call its engine.destroy() first"),
        ("another size", "ConfigError", "the mpu was registered with sequence_parallel_size=2. Set the key to 2"),
        ("not registered", "ConfigError", "groups do not exist yet"),
        ("another mpu", "ConfigError", "mpu: sequence_parallel_size creates its own process groups"),
    ],
)
def test_what_would_be_wrong_stops_every_rank(case, kind, sentence, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(misuse, case)
    assert all(type(error).__name__ == kind and sentence in str(error) for error in caught.value.errors)


def weighted_otherwise(engine, batch, group):
    """A loss with a weight of the program's own: its value and its gradient say the same, and it is let through."""
    return programs.shard_loss(engine, batch, group) * 0.5


def test_a_loss_weight_of_the_programs_own_is_no_lost_gradient(ranks2):
    halved, _ = judged(programs.tutorial, CELL, ranks2, weighted_otherwise)
    assert all(error == pytest.approx(0.5, rel=1e-4) for error in halved.grads.values())

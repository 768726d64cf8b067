"""deepspeed.initialize with our keys: what it refuses, what it probes, what it leaves alone."""

import argparse
import json
import os
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks.cells import Cell, build_model, ds_config, model_config, samples
from benchmarks.ranks import RankError
from tests.sabotage import twice_the_average

PLAIN = Cell()


def initialize(changed: dict[str, Any] | None = None, cell: Cell = PLAIN, **arguments: Any) -> Any:
    import deepspeed

    model = build_model(model_config(cell))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {**ds_config(cell, cell.sp_size), **(changed or {})}
    return deepspeed.initialize(**{"model": model, "optimizer": optimizer, "config": config, **arguments})[0]


def steps_of_a_wrapped_engine(cell: Cell) -> int:
    """How many steps a program's own wrapper around ``engine.step`` sees, put on after ``deepspeed.initialize``."""
    import torch.distributed as dist

    import deepspeed_alst

    engine, seen = initialize(cell=cell), []
    step = engine.step
    engine.step = lambda: (seen.append(1), step())
    for ranks in samples(cell, model_config(cell).vocab_size):
        for batch in deepspeed_alst.shard_dataloader(ranks[dist.get_rank()], engine):
            engine.backward(engine(**batch).loss)
            engine.step()
    engine.destroy()
    return len(seen)


def test_a_programs_own_wrapper_of_step_outlives_the_probe(ranks2):
    assert ranks2.run(steps_of_a_wrapped_engine, Cell()) == [6, 6]


def first_step(cell: Cell, sabotage: bool) -> tuple[bool, bool]:
    """One optimizer step; sabotaged, the sum over ranks is divided by another number."""
    import torch.distributed as dist

    import deepspeed_alst

    engine = initialize(cell=cell)
    before = [param.detach().clone() for param in engine.module.parameters()]
    try:
        own = samples(cell, model_config(cell).vocab_size)[0][dist.get_rank()]
        with twice_the_average(sabotage):
            for batch in deepspeed_alst.shard_dataloader(own, engine):
                engine.backward(engine(**batch).loss)
                engine.step()
        hooks = [param._backward_hooks for param in engine.module.parameters() if param._backward_hooks]
        return not engine.alst_features.gradient_check._watched, not hooks
    except deepspeed_alst.SetupError:
        assert all(torch.equal(now, then) for now, then in zip(engine.module.parameters(), before, strict=True))
        raise
    finally:
        journal = engine.alst_features.patches.journal
        assert journal
        engine.destroy()
        assert journal == []


@pytest.mark.parametrize("stage, reduce_scatter", [(0, True), (1, True), (2, True), (3, False)])
def test_the_probe_stops_an_engine_that_averages_by_another_number(stage, reduce_scatter, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(first_step, Cell(stage=stage, reduce_scatter=reduce_scatter), True)
    for error in caught.value.errors:
        assert type(error).__name__ == "SetupError"
        assert "came out as 2 times the average" in str(error) and f"ZeRO stage {stage}" in str(error)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_probe_runs_once_and_leaves_nothing_behind(stage, dtype, ranks2):
    assert ranks2.run(first_step, Cell(stage=stage, dtype=dtype), False) == [(True, True)] * 2


def _halve_later(engine: Any) -> None:
    for param in engine.module.parameters():
        param.register_hook(lambda grad: grad / 2)


def _halve_after(engine: Any) -> None:
    def halve(param: torch.nn.Parameter) -> None:
        if param.grad is not None:
            param.grad.div_(2)

    for param in engine.module.parameters():
        param.register_post_accumulate_grad_hook(halve)


def _clear(engine: Any) -> None:
    for param in engine.module.parameters():
        param.grad = None


def _freeze(engine: Any) -> None:
    engine.module.model.layers[0].requires_grad_(False)


def _clip(engine: Any) -> None:
    torch.nn.utils.clip_grad_norm_(engine.module.parameters(), 1e-3)


def nothing(*_: Any) -> None:
    pass


# What a program does to an engine at its start, to a loss before its backward, and after each backward.
CLEARED = "optimizer.zero_grad"
IDIOMS = {
    "engine.zero_grad": (nothing, nothing, lambda engine: engine.zero_grad()),
    CLEARED: (nothing, nothing, lambda engine: engine.optimizer.zero_grad()),
    "model.zero_grad": (nothing, nothing, lambda engine: engine.module.zero_grad(set_to_none=False)),
    "grad = None": (nothing, nothing, _clear),
    "clipped by hand": (nothing, nothing, _clip),
    "frozen later": (_freeze, nothing, nothing),
    "hooks": (_halve_later, nothing, nothing),
    "hooks after accumulation": (_halve_after, nothing, nothing),
    "backward twice": (nothing, lambda engine, loss: engine.backward(loss, retain_graph=True), nothing),
}


def steps_by(cell: Cell, idioms: tuple[str, ...]) -> list[tuple[str, str]]:
    """Two optimizer steps of an engine for each idiom, which is followed in the first; what is raised in either."""
    import torch.distributed as dist

    import deepspeed_alst

    raised = []
    for idiom in idioms:
        at_start, before, after = IDIOMS[idiom]
        for sabotage in (False, True) if idiom == CLEARED else (False,):
            engine = initialize(cell=cell)
            at_start(engine)
            try:
                for step, ranks in enumerate(samples(cell, model_config(cell).vocab_size)[:2]):
                    with twice_the_average(sabotage and step == 1):
                        for batch in deepspeed_alst.shard_dataloader(ranks[dist.get_rank()], engine):
                            loss = engine(**batch).loss
                            (before if step == 0 else nothing)(engine, loss)
                            engine.backward(loss)
                            (after if step == 0 else nothing)(engine)
                            engine.step()
            except deepspeed_alst.SetupError as error:
                raised.append((idiom, f"{sabotage} {engine.global_steps} {error}"))
            finally:
                engine.destroy()
    return raised


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_what_a_program_does_to_gradients_in_its_first_step_is_no_false_alarm(stage, ranks2):
    cell = Cell(stage=stage, gas=2)
    for raised in ranks2.run(steps_by, cell, tuple(IDIOMS)):
        # The first step was not compared where gradients were cleared in it, and the second was.
        ((idiom, words),) = raised
        assert idiom == CLEARED and words.startswith("True 1 the gradient of"), words


@pytest.mark.parametrize(
    "changed, arguments, sentence",
    [
        ({}, {"mpu": object()}, "mpu: sequence_parallel_size creates its own process groups"),
        ({}, {"mesh_param": (1, 2)}, "mesh_param: sequence_parallel_size"),
        ({"data_parallel_size": 1}, {}, "data_parallel_size=1"),
        ({"torch_autocast": {"enabled": True}}, {}, "torch_autocast"),
        ({"alst": {"expandable_segments": True}}, {}, "alst.expandable_segments=true: this machine has no CUDA device"),
        ({}, {"model": None}, "NoneType is not a transformers model"),
    ],
)
def test_what_cannot_be_honoured_is_refused_on_every_rank(changed, arguments, sentence, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(_initialize_with, changed, {k: v for k, v in arguments.items() if k != "mpu"}, "mpu" in arguments)
    assert all(sentence in str(error) for error in caught.value.errors)


def _initialize_with(changed: dict[str, Any], arguments: dict[str, Any], mpu: bool) -> None:
    initialize(changed, **arguments, **({"mpu": object()} if mpu else {}))


def an_mpu_without_our_block() -> bool:
    """DeepSpeed's own sequence parallelism, by an mpu: not ours, and left alone."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    parallel_state_sp.initialize_sequence_parallel(2)
    config = ds_config(Cell(), 2)
    del config["alst"]
    import deepspeed

    model = build_model(model_config(Cell()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=parallel_state_sp)[0]
    # Under sequence parallelism the name still reads "sdpa", but is no plain string.
    return hasattr(engine, "alst") or type(model.config._attn_implementation) is not str


def test_an_mpu_without_an_alst_block_is_left_to_deepspeed(ranks2):
    assert ranks2.run(an_mpu_without_our_block) == [False, False]


def config_from(form: str) -> bool:
    config = ds_config(PLAIN, 2)
    path = f"ds{os.environ['RANK']}.json"  # the ranks share a folder
    with open(path, "w") as file:
        json.dump(config, file)
    engine = initialize(
        **{
            "dict": {"config": config},
            "path": {"config": path},
            "config_params": {"config": None, "config_params": config},
            "args": {
                "config": None,
                "args": argparse.Namespace(deepspeed_config=path, local_rank=int(os.environ["LOCAL_RANK"])),
            },
        }[form]
    )
    active = engine.alst.groups.sp_size == 2 and engine.train_batch_size() == 2
    engine.destroy()
    return active


@pytest.mark.parametrize("form", ["dict", "path", "config_params", "args"])
def test_the_config_is_found_wherever_deepspeed_takes_it_from(form, ranks2):
    assert ranks2.run(config_from, form) == [True, True]


def one_rank_alone() -> tuple[bool, bool, int]:
    """At SP 1 the keys are checked and nothing else happens; the loader line of the program stays."""
    import deepspeed_alst

    engine = initialize({"alst": {}}, cell=Cell(sp_size=1))
    loader = [1, 2, 3]
    return hasattr(engine, "alst"), deepspeed_alst.shard_dataloader(loader, engine) is loader, engine.train_batch_size()


def test_at_sp_1_nothing_is_changed(ranks2):
    assert ranks2.run(one_rank_alone) == [(False, True, 2)] * 2


def batch_arithmetic() -> tuple[int, int, int]:
    engine = initialize(cell=Cell(world_size=4, sp_size=2, gas=3))
    before = engine.train_batch_size()
    engine.set_train_batch_size(before * 2)
    after, steps = engine.train_batch_size(), engine.gradient_accumulation_steps()
    engine.destroy()
    return before, after, steps


def test_the_batch_size_counts_replicas_and_not_ranks(ranks4):
    # micro batch 1 x accumulation 3 * 2 x 2 replicas
    assert ranks4.run(batch_arithmetic) == [(12, 24, 12)] * 4


@pytest.mark.parametrize("version, refused", [("0.19.7", True), ("0.19.8", False), ("0.19.9", False), ("0.20.0", True)])
def test_an_untested_deepspeed_is_refused(version, refused, monkeypatch):
    import deepspeed

    from deepspeed_alst import SetupError
    from deepspeed_alst.environment import check_deepspeed

    monkeypatch.setattr(deepspeed, "__version__", version)
    if refused:
        with pytest.raises(SetupError, match=f"deepspeed {version} is not tested.*pip install"):
            check_deepspeed()
    else:
        check_deepspeed()


@pytest.mark.parametrize("found, newer", [("2.13.0+cpu", False), ("2.14.9", False), ("2.15.0", True), ("3.0", True)])
def test_a_torch_newer_than_the_tests_is_warned_of_on_rank_0_alone(found, newer, monkeypatch, recwarn):
    from deepspeed_alst import environment

    monkeypatch.setattr(environment, "version", lambda name: {"torch": found}.get(name, "0"))
    monkeypatch.setenv("RANK", "1")
    environment.check_deepspeed()
    assert not recwarn
    monkeypatch.setenv("RANK", "0")
    environment.check_deepspeed()
    said = [str(each.message) for each in recwarn]
    assert len(said) == newer and all(f": torch {found} (newest tested: 2.14); " in each for each in said)


def misuse(case: str) -> None:
    """A program that is right at SP 1 and would be silently wrong on shards."""
    import torch.distributed as dist

    import deepspeed_alst

    engine = initialize(cell=Cell(world_size=dist.get_world_size()))
    try:
        own = samples(Cell(world_size=dist.get_world_size()), model_config(PLAIN).vocab_size)[0][dist.get_rank()]
        if case == "a label too high" and dist.get_rank() == 1:
            own[0]["labels"][0, 3] = 97
        for batch in deepspeed_alst.shard_dataloader(own, engine):
            if case == "labels of halves":
                batch["shift_labels"] = batch["shift_labels"] + 0.5
            elif case == "labels changed":
                batch["labels"] = batch["labels"].masked_fill(batch["labels"] > 30, -100)
            elif case == "own loss":
                batch = {key: batch[key] for key in ("input_ids", "position_ids")}
            elif case == "cache":
                batch["use_cache"] = True
            elif case == "given a cache":
                batch["cache"] = DynamicCache()
            elif case == "part of the logits":
                batch["logits_to_keep"] = 4
            elif case == "inner model":
                engine.module.model(input_ids=batch["input_ids"])
            elif case == "one rank's list" and dist.get_rank() == 1:
                batch["input_ids"] = batch["input_ids"].tolist()
            elif case == "one replica" and dist.get_rank() < 2:
                del batch["position_ids"]
            loss = engine(**batch).loss
            if case == "direct backward":
                loss.backward()
            engine.backward(loss)
            engine.step()
    finally:
        engine.destroy()


@pytest.mark.parametrize(
    "case, sentence",
    [
        ("labels of halves", ": shift_labels has dtype torch.float32"),
        ("a label too high", "labels of row 0 has 97 at token 3, and the model has logits for 0 to 96"),
        ("labels changed", "its labels and shift_labels disagree"),
        ("own loss", "a loss computed from its logits would cover only this rank's shard"),
        ("cache", "leave it out. To generate, call model.generate"),
        ("given a cache", "a cache is asked for (use_cache, cache,"),
        ("part of the logits", "logits_to_keep is given"),
        ("inner model", "LlamaAttention was called outside of its causal language model"),
        ("one rank's list", "invalid batch on rank 1: input_ids is a list, not a tensor"),
        ("direct backward", r"call engine.backward(loss), not loss.backward()"),
    ],
)
def test_what_would_be_silently_wrong_stops_every_rank(case, sentence, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(misuse, case)
    assert all(error is not None and sentence in str(error) for error in caught.value.errors)


def test_a_bad_batch_in_one_replica_stops_the_other_too(ranks4):
    with pytest.raises(RankError) as caught:
        ranks4.run(misuse, "one replica")
    assert all("invalid batch on rank 0: it has no position_ids" in str(e) for e in caught.value.errors)


def different_configs(changed: dict[str, Any]) -> None:
    import torch.distributed as dist

    initialize(changed if dist.get_rank() else {})


@pytest.mark.parametrize(
    "changed",
    [{"seq_parallel_communication_data_type": "bf16"}, {"zero_optimization": {"stage": 2, "reduce_bucket_size": 77}}],
    ids=["dtype", "bucket"],
)
def test_ranks_with_different_ds_configs_stop_together(changed, ranks2):
    with pytest.raises(RankError) as caught:
        ranks2.run(different_configs, changed)
    for error in caught.value.errors:
        assert type(error).__name__ == "ConfigError"
        assert (
            "have different ds_configs" in str(error)
            and "on rank 1" in str(error)
            and next(iter(changed)) in str(error)
        )


@pytest.mark.parametrize("alst", [{}, {"tiled_mlp_compute": True}, {"activation_checkpoint_cpu_offload": True}])
@pytest.mark.parametrize("arguments", [{}, {"model": None}])
def test_a_call_without_a_model_is_deepspeeds_to_refuse(arguments, alst):
    import deepspeed

    with pytest.raises(AssertionError, match="requires a model"):
        deepspeed.initialize(config={"train_micro_batch_size_per_gpu": 1, "alst": alst}, **arguments)

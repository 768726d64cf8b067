"""Checkpoints: saved and resumed anywhere, the run goes on as if it had not been interrupted.

Four steps in one run are the reference; benchmarks/resume.py has the runs. A frozen layer has weights of its own in the
run that saves, so that a resumed run which kept its own would be off.
"""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import model_config
from benchmarks.ranks import RankError, Ranks
from benchmarks.resume import SAVED_AFTER, STEPS, Job, Outcome, build_engine, resumed, run, train_step, weights_of
from deepspeed_alst.attention.private_config import PrivateName
from deepspeed_alst.checkpoint.save import STAMP
from deepspeed_alst.checkpoint.universal import convert, is_universal
from deepspeed_alst.errors import CheckpointError, DataError

FROZEN = "layers.0.mlp.up_proj"
TAG = f"global_step{SAVED_AFTER}"


@pytest.fixture(scope="module")
def ranks1():
    with Ranks(1) as ranks:
        ranks.run(os.getpid)
        yield ranks


@pytest.fixture(scope="module")
def saved(ranks2, tmp_path_factory):
    """By ZeRO stage: a job at SP 2 on 2 ranks with a frozen layer, its uninterrupted run, its folder of checkpoints."""
    made: dict[int, Any] = {}

    def of(stage: int) -> Any:
        if stage not in made:
            folder, job = tmp_path_factory.mktemp(f"stage{stage}"), Job.of(stage, 2, 2, freeze=FROZEN)
            whole = ranks2.run(run, job, 0, STEPS)[0]
            ranks2.run(run, job, 0, SAVED_AFTER, None, str(folder))
            made[stage] = job, whole, folder
        return made[stage]

    return of


def copy_of(folder: Path, to: Path) -> Path:
    """A checkpoint's own files, which a test may spoil."""
    (to / TAG).mkdir(parents=True)
    for each in (folder / TAG).glob("*.pt"):
        (to / TAG / each.name).write_bytes(each.read_bytes())
    (to / "latest").write_text(TAG)
    return to


def files_of(folder: Path) -> tuple[Path, list[Path]]:
    """Rank 0's model file of a checkpoint below ZeRO 3, and all optimizer files."""
    return folder / TAG / "mp_rank_00_model_states.pt", sorted((folder / TAG).glob("*_optim_states.pt"))


def is_made_anew(folder: Path) -> bool:
    """Whether a checkpoint would be converted now; it is not."""
    with contextlib.closing(convert(*files_of(folder), 1)) as steps:
        return next(steps, False)


# --- the same layout


def assert_every_bit_is_the_same(rest: Outcome, whole: Outcome) -> None:
    assert rest.losses == whole.losses[SAVED_AFTER:] and whole.losses[0] != whole.losses[-1]
    for name, weight in whole.weights.items():
        assert torch.equal(rest.weights[name], weight), name


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2)), 1, 3])
def test_resumed_at_the_same_layout_every_bit_is_the_same(stage, saved, ranks2):
    job, whole, folder = saved(stage)
    assert_every_bit_is_the_same(ranks2.run(run, job, SAVED_AFTER, STEPS, str(folder))[0], whole)


@pytest.mark.parametrize(
    ("stage", "dtype", "optimizer"),
    [
        (2, "fp32", "sgd"),
        *(pytest.param(stage, "bf16", "adamw", marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
        *(pytest.param(stage, "fp32", "sgd", marks=pytest.mark.slow) for stage in (0, 1, 3)),
        *(pytest.param(stage, "bf16", "sgd", marks=pytest.mark.slow) for stage in (0, 1, 2, 3)),
    ],
)
def test_so_it_is_in_bf16_and_with_sgd(stage, dtype, optimizer, ranks2, tmp_path):
    job = Job.of(stage, 2, 2, optimizer, dtype=dtype)
    whole = ranks2.run(run, job, 0, STEPS)[0]
    ranks2.run(run, job, 0, SAVED_AFTER, None, str(tmp_path))
    assert_every_bit_is_the_same(ranks2.run(run, job, SAVED_AFTER, STEPS, str(tmp_path))[0], whole)
    assert not list(tmp_path.glob("*universal*"))


# --- another SP degree on as many ranks


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_sp_degree_on_as_many_ranks_needs_no_conversion(stage, saved, ranks2, tmp_path):
    job, whole, folder = saved(stage)
    copy = copy_of(folder, tmp_path / "copy")
    row = resumed(job, whole, str(copy), Job.of(stage, 1, 2, freeze=FROZEN), ranks2)
    assert row.met, row
    assert {each.name for each in copy.iterdir()} == {"latest", TAG}


@pytest.mark.slow
def test_two_replicas_at_sp2_go_on_as_one_at_sp4(ranks4, tmp_path):
    job = Job.of(3, 2, 4)
    whole = ranks4.run(run, job, 0, STEPS)[0]
    ranks4.run(run, job, 0, SAVED_AFTER, None, str(tmp_path))
    row = resumed(job, whole, str(tmp_path), Job.of(3, 4, 4), ranks4)
    assert row.met and not list(tmp_path.glob("*universal*"))


# --- another number of ranks


def convert_by_hand(folder: Path) -> None:
    """As DeepSpeed's documentation has it: no --inject_missing_state."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", folder / TAG]
    done = subprocess.run([*command, "--output_folder", folder / f"{TAG}_universal"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def load_and_watch(job: Job, folder: str, **arguments: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """What loading prints on rank 0, and the weights that it brings."""
    engine, said = build_engine(job, from_scratch=False), io.StringIO()
    with contextlib.redirect_stderr(said):
        engine.load_checkpoint(folder, **arguments)
    weights = weights_of(engine)
    engine.destroy()
    return said.getvalue(), weights


def test_deepspeeds_converter_takes_the_checkpoint_and_a_program_without_this_package_goes_on(saved, ranks1):
    _, whole, folder = saved(1)
    convert_by_hand(folder)
    # The frozen layer is one that DeepSpeed's own universal load would leave as it is: the program brings it.
    plain = Job.of(1, 1, 1, extra=(("checkpoint", {"load_universal": True}),), freeze=FROZEN)
    with_frozen = ranks1.run(run_with_doubled_frozen, plain, str(folder))[0]
    assert max(abs(a - b) / b for a, b in zip(with_frozen, whole.losses[SAVED_AFTER:], strict=True)) < 1e-6
    # And this package takes what was converted by hand.
    said, _ = ranks1.run(load_and_watch, Job.of(1, 1, 1, freeze=FROZEN), str(folder))[0]
    assert "converted before" in said and not (folder / f"{TAG}_universal" / "made_by_deepspeed_alst").exists()


def run_with_doubled_frozen(job: Job, folder: str) -> list[float]:
    engine = build_engine(job, from_scratch=True)
    assert "load_checkpoint" not in vars(engine)
    engine.load_checkpoint(folder)
    vocab = model_config(job.cell).vocab_size
    losses = [train_step(engine, step, vocab) for step in range(SAVED_AFTER, STEPS)]
    engine.destroy()
    return losses


@pytest.mark.parametrize(
    ("world_size", "stage"),
    [
        pytest.param(ranks, stage, marks=[pytest.mark.slow] * ((ranks, stage) not in ((4, 3), (1, 2))))
        for ranks in (1, 4)
        for stage in (0, 1, 2, 3)
    ],
)
def test_on_another_number_of_ranks_the_run_goes_on(stage, world_size, saved, request):
    job, whole, folder = saved(stage)
    ranks = request.getfixturevalue(f"ranks{world_size}")
    if not (folder / f"{TAG}_universal").exists() and stage:
        (folder / f"{TAG}_universal.partial").mkdir()  # as a killed conversion leaves it
    row = resumed(job, whole, str(folder), Job.of(stage, world_size, world_size, freeze=FROZEN), ranks)
    assert row.met, row
    left = {each.name for each in folder.iterdir() if each.suffix != ".py"}  # DeepSpeed's scripts
    assert left == {"latest", TAG} | ({f"{TAG}_universal", "latest_universal"} if stage else set())
    assert (folder / "latest").read_text() == TAG


def test_the_conversion_is_said_once_in_a_line_and_used_again(saved, ranks1, ranks4):
    _, _, folder = saved(3)
    target = folder / f"{TAG}_universal"
    if not target.exists():
        ranks1.run(load_and_watch, Job.of(3, 1, 1, freeze=FROZEN), str(folder))
    before = (target / "zero" / "optimizer_state.pt").stat()
    said = [each[0] for each in ranks4.run(load_and_watch, Job.of(3, 4, 4, freeze=FROZEN), str(folder))]
    assert said[0].count("\n") == 1 and "saved on 2 ranks and this run has 4" in said[0] and str(target) in said[0]
    assert said[1:] == [""] * 3
    after = (target / "zero" / "optimizer_state.pt").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("how", [{"load_module_only": True}, {"load_optimizer_states": False}, {"tag": "by name"}])
def test_weights_alone_come_on_another_number_of_ranks_too(stage, how, saved, ranks2, ranks1):
    job, _, folder = saved(stage)
    there = ranks2.run(load_and_watch, job, str(folder))[0][1]
    if how == {"tag": "by name"}:  # of the universal checkpoint, which needs no key in the ds_config
        how = {"tag": f"{TAG}_universal"}
        if not (folder / how["tag"]).exists():
            ranks1.run(load_and_watch, Job.of(stage, 1, 1, freeze=FROZEN), str(folder))
    here = ranks1.run(load_with, Job.of(stage, 1, 1, freeze=FROZEN), str(folder), how)[0]
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_weights_alone_are_of_the_tag_that_is_asked_for(saved, ranks2, tmp_path):
    # DeepSpeed 0.19.8 takes ZeRO 3's from the tag that `latest` names.
    job, _, folder = saved(3)
    copy = copy_of(folder, tmp_path / "copy")
    there = ranks2.run(load_and_watch, job, str(copy))[0][1]
    ranks2.run(save_and_look, job, str(copy))
    assert (copy / "latest").read_text() != TAG
    here = ranks2.run(load_with, job, str(copy), {"tag": TAG, "load_optimizer_states": False})[0]
    assert all(torch.equal(there[name], here[name]) for name in there)


def test_a_file_without_optimizer_states_stops_all_ranks(saved, ranks2, tmp_path):
    job, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    path = sorted((copy / TAG).glob("*_optim_states.pt"))[1]
    state = torch.load(path, weights_only=False)
    del state["optimizer_state_dict"]
    torch.save(state, path)
    with pytest.raises(RankError) as caught:
        ranks2.run(load_and_watch, job, str(copy), seconds=120)
    assert all("has no optimizer_state_dict" in str(error) for error in caught.value.errors)


def load_with(job: Job, folder: str, how: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_and_watch(job, folder, **how)[1]


def save_and_look(job: Job, folder: str) -> tuple[dict[str, Any], bool]:
    """The caller's state after it was saved, and whether the model still has the entry for the converter."""
    engine, mine = build_engine(job), {"place": [1, 2]}
    engine.save_checkpoint(folder, tag="mine", client_state=mine)
    left = hasattr(engine.module, "universal_checkpoint_info")
    engine.destroy()
    return mine, left


@pytest.mark.parametrize("stage", [2, 3])
def test_the_files_say_that_there_is_no_tensor_parallelism_and_keep_the_callers_state(stage, ranks2, tmp_path):
    assert ranks2.run(save_and_look, Job.of(stage, 2, 2), str(tmp_path)) == [({"place": [1, 2]}, False)] * 2
    state = torch.load(next((tmp_path / "mine").glob("*_model_states.pt")), weights_only=False)
    assert state["checkpoint_parallel_dimensions"] == {"tp_degree": 1, "pp_degree": 1}
    assert state["dp_world_size"] == 2 and state["mp_world_size"] == 1
    assert state["universal_checkpoint_info"] and state["place"] == [1, 2]


# --- weights for others


def export(job: Job, folder: str) -> None:
    """Train, and save in every way that DeepSpeed and transformers have."""
    engine = build_engine(job, from_scratch=True)
    vocab = model_config(job.cell).vocab_size
    for step in range(SAVED_AFTER):
        train_step(engine, step, vocab)
    out = Path(folder)
    engine.save_checkpoint(folder)
    engine.save_16bit_model(str(out / "16bit"))
    stage3 = job.cell.stage == 3
    state = engine._zero3_consolidated_16bit_state_dict() if stage3 else engine.module.state_dict()
    if dist.get_rank() == 0:
        engine.module.save_pretrained(out / "pretrained", state_dict=state)
    weights = weights_of(engine)
    if dist.get_rank() == 0:
        torch.save({name: weight.float() for name, weight in weights.items()}, out / "weights.pt")
    dist.barrier()
    engine.destroy()


RELOAD = """
import json, subprocess, sys, torch
from pathlib import Path
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from transformers import AutoModelForCausalLM

def worst(found, wanted):
    return max(float((found[name].float() - w).norm() / w.norm()) for name, w in wanted.items())

folders, figures = [Path(each) for each in sys.argv[1:]], {}
sp1 = torch.load(folders[0] / "weights.pt")
for folder in folders[1:]:
    wanted = torch.load(folder / "weights.pt")
    figures[f"{folder.name} against SP 1"] = worst(wanted, sp1)
    model = AutoModelForCausalLM.from_pretrained(folder / "pretrained")
    figures[f"{folder.name} from_pretrained"] = worst(model.state_dict(), wanted)
    figures[f"{folder.name} 16bit"] = worst(torch.load(folder / "16bit" / "pytorch_model.bin"), wanted)
    figures[f"{folder.name} fp32"] = worst(get_fp32_state_dict_from_zero_checkpoint(folder), wanted)
subprocess.run([sys.executable, folder / "zero_to_fp32.py", folder, folder / "consolidated"], check=True,
               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
figures["zero_to_fp32.py"] = worst(torch.load(folder / "consolidated" / "pytorch_model.bin"), wanted)
ours = [name for name in sys.modules if "deepspeed_alst" in name and not name.startswith("_")]
print("FIGURES", json.dumps([figures, ours]))
"""


def test_exported_weights_are_those_of_sp1_and_load_without_this_package(ranks2, tmp_path):
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    folders = [tmp_path / name for name in ("sp1", "stage2", "stage3")]
    for folder, (stage, sp_size) in zip(folders, ((2, 1), (2, 2), (3, 2)), strict=True):
        ranks2.run(export_with, Job.of(stage, sp_size, 2, "sgd"), str(folder), gather if stage == 3 else {})
        saved_config = json.loads((folder / "pretrained" / "config.json").read_text())
        assert "alst" not in json.dumps(saved_config) and saved_config["architectures"] == ["LlamaForCausalLM"]
    environment = {**os.environ, "DEEPSPEED_ALST_AUTOLOAD": "0", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, *folders], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures, ours = json.loads(done.stdout.split("FIGURES ")[1])
    assert ours == [] and len(figures) == 9
    for what, error in figures.items():
        assert error <= (1e-6 if what.endswith("against SP 1") else 0.0), figures


def export_with(job: Job, folder: str, zero_keys: dict[str, Any]) -> None:
    import benchmarks.resume as resume
    from benchmarks.cells import ds_config

    def with_keys(cell: Any, sp_size: int) -> dict[str, Any]:
        config = ds_config(cell, sp_size)
        return {**config, "zero_optimization": {**config["zero_optimization"], **zero_keys}}

    resume.ds_config = with_keys
    try:
        export(job, folder)
    finally:
        resume.ds_config = ds_config


def edit_the_config(job: Job) -> tuple[Any, ...]:
    engine = build_engine(job)
    model, theirs = engine.module, engine.module.config
    name, was = theirs._attn_implementation, theirs.vocab_size
    theirs.use_cache = False
    theirs.pad_token_id = 5
    theirs.a_note = "kept"
    engine.destroy()
    config = model.config
    assert isinstance(name, PrivateName) and config is not theirs
    return config.use_cache, config.pad_token_id, config.a_note, config._attn_implementation, config.vocab_size == was


def test_what_a_program_changes_in_the_models_config_outlives_the_engine(ranks2):
    assert ranks2.run(edit_the_config, Job.of(2, 2, 2)) == [(False, 5, "kept", "sdpa", True)] * 2


# --- what cannot be loaded


def load_from(job: Job, folder: str, tag: str | None = None) -> Any:
    engine = build_engine(job, from_scratch=False)
    try:
        return engine.load_checkpoint(folder, tag=tag)[0]
    finally:
        engine.destroy()


def refusals(ranks: Ranks, job: Job, folder: Path, tag: str | None = None) -> list[str]:
    """What loading says, rank by rank; every rank must refuse."""
    with pytest.raises(RankError) as raised:
        ranks.run(load_from, job, str(folder), tag)
    assert all(isinstance(error, CheckpointError) for error in raised.value.errors), raised.value
    return [str(error) for error in raised.value.errors]


def test_where_there_is_no_checkpoint_deepspeeds_answer_is_none(ranks2, tmp_path):
    assert ranks2.run(load_from, Job.of(2, 2, 2), str(tmp_path / "none")) == [None, None]


@pytest.mark.parametrize("stage", [2, 3])
def test_a_tag_that_is_not_there_is_an_error_that_names_those_that_are(stage, saved, ranks2):
    job, _, folder = saved(stage)
    for said in refusals(ranks2, job, folder, "global_step9"):
        assert "global_step9: no such checkpoint" in said and TAG in said


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_another_model_is_refused_by_the_names_and_shapes_of_its_weights(stage, saved, ranks2):
    job, _, folder = saved(stage)
    for said in refusals(ranks2, replace(job, cell=replace(job.cell, kv_heads=4)), folder):
        # Without ZeRO, DeepSpeed's own error.
        shapes = ("[16, 32]", "[32, 32]") if stage else ("torch.Size([16, 32])", "torch.Size([32, 32])")
        assert "k_proj.weight" in said and all(shape in said for shape in shapes)
        assert "is of another model" in said or not stage


def test_another_zero_stage_is_refused(saved, ranks2):
    _, _, folder = saved(2)
    for said in refusals(ranks2, Job.of(3, 2, 2, freeze=FROZEN), folder):
        assert "zero_pp_rank_0_mp_rank_00_model_states.pt is missing" in said and "this engine runs stage 3" in said


@pytest.mark.parametrize("stage", [2, 3])
def test_a_file_that_only_one_rank_reads_stops_all_ranks_if_it_is_cut_short(stage, saved, ranks2, tmp_path):
    job, _, folder = saved(stage)
    copy = copy_of(folder, tmp_path / "copy")
    spoilt = copy / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    spoilt.write_bytes(spoilt.read_bytes()[:-100])
    first, second = refusals(ranks2, job, copy)
    assert "rank 1: " in first and "truncated" in first and spoilt.name in second
    spoilt.unlink()
    assert all(f"{spoilt.name} is missing" in said and "No such file" in said for said in refusals(ranks2, job, copy))


def damage(path: Path, how: str) -> None:
    """Change bytes in the middle of the largest tensor of a file."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda each: each.file_size)
    data = bytearray(path.read_bytes())
    place = largest.header_offset + 128 + largest.file_size // 2
    data[place : place + 8] = bytes(8) if how == "zeroed" else bytes(each ^ 0x10 for each in data[place : place + 8])
    assert data != path.read_bytes()
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("stage", "name", "how"),
    [
        (0, "mp_rank_00_model_states.pt", "flipped"),
        (2, "mp_rank_00_model_states.pt", "zeroed"),
        (2, "zero_pp_rank_1_mp_rank_00_optim_states.pt", "flipped"),
        (3, "zero_pp_rank_1_mp_rank_00_model_states.pt", "flipped"),
    ],
)
def test_a_file_with_a_damaged_tensor_stops_all_ranks(stage, name, how, saved, ranks2, tmp_path):
    job, _, folder = saved(stage)
    copy = copy_of(folder, tmp_path / "copy")
    damage(copy / TAG / name, how)
    assert all(f"{name} is missing, truncated or damaged: BadZipFile" in said for said in refusals(ranks2, job, copy))


def test_a_damaged_tensor_of_a_universal_checkpoint_stops_all_ranks(saved, ranks1, ranks4, tmp_path):
    _, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    ranks1.run(load_and_watch, Job.of(2, 1, 1, freeze=FROZEN), str(copy))
    damage(copy / f"{TAG}_universal" / "zero" / "lm_head.weight" / "exp_avg.pt", "flipped")
    job = Job.of(2, 4, 4, freeze=FROZEN)
    assert all(
        "exp_avg.pt is missing, truncated or damaged" in said
        for said in refusals(ranks4, job, copy, f"{TAG}_universal")
    )


@pytest.mark.parametrize(("stage", "kind"), [(2, "optim"), (3, "model")])
def test_files_of_two_ranks_that_were_exchanged_stop_all_ranks(stage, kind, saved, ranks2, tmp_path):
    job, _, folder = saved(stage)
    copy = copy_of(folder, tmp_path / "copy")
    first, second = sorted((copy / TAG).glob(f"zero_pp_rank_*_{kind}_states.pt"))
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    for said in refusals(ranks2, job, copy):
        assert any(f"{x.name} was written by rank" in said and "the files were mixed" in said for x in (first, second))


def test_files_of_two_saves_under_one_tag_stop_all_ranks(saved, ranks2, tmp_path):
    job, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    ranks2.run(run, job, 0, SAVED_AFTER, None, str(tmp_path / "again"))
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (copy / TAG / name).write_bytes((tmp_path / "again" / TAG / name).read_bytes())
    assert all(f"{name} and mp_rank_00_model_states.pt are not of the same" in x for x in refusals(ranks2, job, copy))


def test_files_that_were_saved_without_stamps_are_loaded(saved, ranks2, tmp_path):
    job, whole, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    for path in (copy / TAG).glob("*.pt"):
        state = torch.load(path, weights_only=False)
        assert state.pop(STAMP)["world_size"] == 2
        torch.save(state, path)
    assert_every_bit_is_the_same(ranks2.run(run, job, SAVED_AFTER, STEPS, str(copy))[0], whole)


def load_in_another_order(job: Job, folder: str, **how: Any) -> dict[str, torch.Tensor]:
    class Reversed(torch.optim.AdamW):
        def __init__(self, groups: list[dict[str, Any]]) -> None:
            super().__init__([{**group, "params": group["params"][::-1]} for group in groups])

    with mock.patch.object(torch.optim, "AdamW", Reversed):
        return load_and_watch(job, folder, **how)[1]


@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (0, 1), (1, 2), (3, 2)])
def test_another_order_of_the_optimizers_parameters_is_refused(stage, world_size, saved, request):
    _, _, folder = saved(stage)
    ranks = request.getfixturevalue(f"ranks{world_size}")
    with pytest.raises(RankError) as raised:
        ranks.run(load_in_another_order, Job.of(stage, world_size, world_size, freeze=FROZEN), str(folder), seconds=60)
    for error in raised.value.errors:
        assert isinstance(error, CheckpointError) and "the weights in another order" in str(error)
        assert re.search(
            r"model.embed_tokens.weight( \[.*\])? at place 0 of group 0, here is lm_head.weight( \[.*\])? at place 0",
            str(error),
        )


def test_weights_alone_and_another_number_of_ranks_go_by_name_in_any_order(saved, ranks2, ranks1):
    job, _, folder = saved(2)
    wanted = ranks2.run(load_and_watch, job, str(folder))[0][1]
    alone = ranks2.run(partial(load_in_another_order, load_module_only=True), job, str(folder))[0]
    converted = ranks1.run(load_in_another_order, Job.of(2, 1, 1, freeze=FROZEN), str(folder))[0]
    assert all(torch.equal(alone[name], x) and torch.equal(converted[name], x) for name, x in wanted.items())


def save_differently(folder: str, argument: str, values: tuple[Any, Any]) -> str:
    engine = build_engine(Job.of(2, 2, 2))
    value = values[dist.get_rank()]
    value = {"step": lambda: 0} if value == "no pickle" else value
    try:
        engine.save_checkpoint(**{"save_dir": folder, argument: value})
    except CheckpointError as error:
        return str(error)
    finally:
        engine.destroy()
    return "saved"


@pytest.mark.parametrize(
    ("argument", "values", "words"),
    [
        ("tag", ("a", "b"), "tag='a' on rank 0, 'b' on rank 1"),
        ("save_latest", (True, False), "save_latest=True on rank 0"),
        ("save_dir", ("one", "two"), "save_dir="),
        ("client_state", ({}, None), "could not be written"),
        ("client_state", ("no pickle", {}), "could not be written"),
    ],
    ids=["tag", "latest", "folder", "state", "no pickle"],
)
def test_what_ranks_ask_for_differently_is_not_saved(argument, values, words, ranks2, tmp_path):
    if argument == "save_dir":
        values = tuple(str(tmp_path / each) for each in values)
    for said in ranks2.run(save_differently, str(tmp_path), argument, values, seconds=60):
        assert words in said
    assert not (tmp_path / "latest").exists()


def load_differently(job: Job, folder: str, tags: tuple[str | None, str | None]) -> Any:
    return load_from(job, folder, tags[dist.get_rank()])


@pytest.mark.parametrize("tags", [(TAG, "other"), (TAG, None), (None, TAG)])
def test_different_tags_are_not_loaded(tags, saved, ranks2, tmp_path):
    job, _, folder = saved(2)
    copy = copy_of(folder, tmp_path)
    (copy / TAG).rename(copy / "other")
    copy_of(folder, tmp_path)
    (copy / "latest").unlink()
    with pytest.raises(RankError) as raised:
        ranks2.run(load_differently, job, str(copy), tags, seconds=60)
    for error in raised.value.errors:
        assert f"tag={tags[0]!r} on rank 0, {tags[1]!r} on rank 1" in str(error)


def test_a_latest_that_is_no_text_stops_all_ranks_in_a_save_and_in_a_load(ranks2, tmp_path):
    (tmp_path / "latest").write_bytes(b"\xff\xfe\x00")
    for said in ranks2.run(save_differently, str(tmp_path), "tag", ("a", "a"), seconds=60):
        assert f"{tmp_path / 'latest'} cannot be read" in said
    assert all("latest cannot be read" in said for said in refusals(ranks2, Job.of(2, 2, 2), tmp_path))


def test_a_failed_conversion_is_an_error_with_the_command_and_leaves_nothing_behind(saved, ranks1, tmp_path):
    _, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    spoilt = copy / TAG / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    torch.save({STAMP: torch.load(spoilt, weights_only=False)[STAMP]}, spoilt)
    (said,) = refusals(ranks1, Job.of(2, 1, 1, freeze=FROZEN), copy)
    assert "could not be converted" in said and "KeyError" in said and "deepspeed.checkpoint.ds_to_universal" in said
    assert {each.name for each in copy.iterdir()} == {"latest", TAG}


CONVERT_AND_WAIT = """
import sys, time
from pathlib import Path
from deepspeed_alst.checkpoint import universal

universal._ENDS_WITH_ITS_PARENT = universal._ENDS_WITH_ITS_PARENT.replace(universal._CONVERTER, "waiting_converter")
model_file, *optimizer_files = map(Path, sys.argv[1:])
print(next(universal.convert(model_file, optimizer_files, 1)), flush=True)
time.sleep(600)
"""
WAITING_CONVERTER = """
import os, time
from concurrent.futures import ProcessPoolExecutor

def work(index):
    os.write(1, f"worker {os.getpid()}\\n".encode())  # at once: two write into one file
    time.sleep(600)

if __name__ == "__main__":
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
"""


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for whoever started it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_a_conversion_ends_with_the_run_that_started_it_and_there_is_one_at_a_time(saved, tmp_path):
    _, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    (tmp_path / "waiting_converter.py").write_text(WAITING_CONVERTER)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[2])])
    model_file, optimizer_files = files_of(copy)
    command = [sys.executable, "-c", CONVERT_AND_WAIT, model_file, *optimizer_files]
    environment, log = {**os.environ, "PYTHONPATH": path}, copy / f"{TAG}_universal.partial" / "log"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        try:
            wait_until(lambda: log.is_file() and len(re.findall(r"^worker \d+$", log.read_text(), re.M)) == 2)
            pids = [each.pid for each in psutil.Process(run.pid).children(recursive=True)]
            workers = map(int, re.findall(r"^worker (\d+)$", log.read_text(), re.M))
            assert len(pids) == 3 and {*workers} < {*pids} and all(map(is_alive, pids))
            with pytest.raises(CheckpointError, match="another run is converting this checkpoint"):
                next(convert(model_file, optimizer_files, 1))
        finally:
            run.kill()  # it would wait for minutes
    wait_until(lambda: not any(map(is_alive, pids)))
    assert is_made_anew(copy)
    assert {each.name for each in copy.iterdir()} == {"latest", TAG}


def test_where_nothing_can_be_written_the_error_gives_the_command(saved, ranks4, tmp_path):
    _, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    (copy / f"{TAG}_universal.partial").write_text("root may write anywhere, but not where a file is")
    for said in refusals(ranks4, Job.of(2, 4, 4, freeze=FROZEN), copy):
        assert "is not writable" in said
        assert f"--output_folder ELSEWHERE/{TAG}_universal" in said


def test_an_optimizer_that_is_not_adam_is_refused_on_another_number_of_ranks(ranks2, ranks1, tmp_path):
    ranks2.run(run, Job.of(2, 2, 2, "sgd"), 0, SAVED_AFTER, None, str(tmp_path))
    (said,) = refusals(ranks1, Job.of(2, 1, 1, "sgd"), tmp_path)
    assert "Adam states only" in said and "Resume on 2 ranks" in said


def test_files_of_more_or_fewer_ranks_under_the_same_tag_are_refused(saved, ranks1, tmp_path):
    _, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    first = copy / TAG / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    first.with_name("zero_pp_rank_2_mp_rank_00_optim_states.pt").write_bytes(first.read_bytes())
    job = Job.of(2, 1, 1, freeze=FROZEN)
    (said,) = refusals(ranks1, job, copy)
    assert "zero_pp_rank_2" in said and "was written by rank 0, not 2" in said
    state = torch.load(first, weights_only=False)
    state[STAMP] |= {"rank": 2, "save": "an earlier one"}
    torch.save(state, first.with_name("zero_pp_rank_2_mp_rank_00_optim_states.pt"))
    first.unlink()
    (said,) = refusals(ranks1, job, copy)
    assert f"to be removed: {first.name}, zero_pp_rank_2_mp_rank_00_optim_states.pt" in said


def save_again(folder: Path, stamped: bool) -> None:
    """Replace a model file by that of another save."""
    path = files_of(folder)[0]
    state = torch.load(path, weights_only=False)
    stamp = state.pop(STAMP, {})
    torch.save({**state, STAMP: {**stamp, "save": "another"}} if stamped else state, path)


@pytest.mark.parametrize("stamped", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_universal_checkpoint_is_used_only_while_it_is_that_of_the_files(stamped, saved, ranks1, tmp_path):
    _, _, folder = saved(2)
    copy = copy_of(folder, tmp_path / "copy")
    if not stamped:
        save_again(copy, stamped)
        for path in files_of(copy)[1]:
            torch.save({key: x for key, x in torch.load(path, weights_only=False).items() if key != STAMP}, path)
    ranks1.run(load_and_watch, Job.of(2, 1, 1, freeze=FROZEN), str(copy))
    target = copy / f"{TAG}_universal"
    assert is_universal(target) and not is_made_anew(copy)
    save_again(copy, stamped)
    assert is_made_anew(copy)
    (target / "made_by_deepspeed_alst").unlink()  # by hand: not ours to remove
    with pytest.raises(CheckpointError, match="exists, and is not the universal checkpoint"):
        is_made_anew(copy)
    assert not list(copy.glob("*.partial")) and is_universal(target)


def test_the_files_of_a_checkpoint_are_zip_archives_which_the_check_for_cut_files_relies_on(saved):
    _, _, folder = saved(2)
    assert all(zipfile.is_zipfile(each) for each in (folder / TAG).glob("*.pt"))


# --- the data loader's own state


class Stateful:
    """A loader that knows its place, as torchdata's StatefulDataLoader does."""

    def __init__(self, batches: int) -> None:
        self.batches, self.place = batches, 0

    def __iter__(self) -> Any:
        while self.place < self.batches:
            self.place += 1
            ids = 40 * dist.get_rank() + 10 * self.place + torch.arange(8)[None]
            yield {"input_ids": ids, "labels": ids}
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def first_tokens(loader: Any) -> list[int]:
    return [int(batch["input_ids"][0, 0]) for batch in loader]


def resume_the_loader() -> tuple[list[int], list[list[int]], list[str], bool]:
    import deepspeed_alst

    engine = build_engine(Job.of(2, 2, 2))
    whole = first_tokens(deepspeed_alst.shard_dataloader(Stateful(3), engine))
    loader, rests, errors = deepspeed_alst.shard_dataloader(Stateful(3), engine), [], []
    for taken, _ in enumerate(loader, start=1):
        try:
            state = loader.state_dict()
        except DataError as error:
            errors.append(f"{taken}: {error}")
            continue
        later = deepspeed_alst.shard_dataloader(Stateful(3), engine)
        later.load_state_dict(state)
        # At the end of the data the inner loader's own state is that it has handed out everything.
        rests.append((whole[:taken] + first_tokens(later)) if taken < 6 else whole)
    plain = hasattr(deepspeed_alst.shard_dataloader([1], engine), "state_dict")
    engine.destroy()
    return whole, rests, errors, plain


def test_a_stateful_loader_resumes_where_a_refill_ends_and_refuses_its_state_within_one(ranks2):
    for whole, rests, errors, plain in ranks2.run(resume_the_loader):
        assert len(whole) == 6 and rests == [whole] * 3
        assert [error.split(":")[0] for error in errors] == ["1", "3", "5"]
        assert "1 of 2 micro-steps are still to come" in errors[0]
        assert not plain

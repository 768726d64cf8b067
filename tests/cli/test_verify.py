"""``ds_alst verify``: equal runs are found equal, and of unequal ones the first place where they part is named."""

import json
import shutil
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from deepspeed_alst.cli.launch import builtin_config, configs_of, with_file
from deepspeed_alst.cli.main import main
from deepspeed_alst.cli.trial import samples
from deepspeed_alst.cli.verify import allowed, first_difference, judge, show
from deepspeed_alst.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """The runs of a real comparison: a public shape in small, ZeRO 3, odd lengths, tiles."""
    folder = tmp_path_factory.mktemp("verify")
    CONFIG_MAPPING["qwen3"](num_hidden_layers=28, layer_types=["full_attention"] * 28).to_json_file(
        folder / "config.json"
    )
    ds_config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
        "sequence_parallel_size": 8,
        "alst": {"tiled_mlp_compute": True},
    }
    (folder / "ds.json").write_text(json.dumps(ds_config))
    words = ["verify", "--model", str(folder / "config.json"), "--ds_config", str(folder / "ds.json"), "--steps", "3"]
    assert main([*words, "--num_gpus", "2", "--output", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def runs(verified, tmp_path):
    """A copy of them, to be changed."""
    return Path(shutil.copytree(verified, tmp_path / "out"))


def judged(runs):
    return judge(runs, "SP 1", "SP 2", sp_size=2)


def test_equal_runs_are_equal(verified):
    said = json.loads((verified / "verify.json").read_text())
    assert (verified / "loss.png").stat().st_size > 1000
    assert said["loss"].keys() == {"SP 1", "SP 2"} and len(said["loss"]["SP 1"]) == 3
    assert said["loss"]["SP 1"][0] > said["loss"]["SP 1"][-1]  # it does train
    assert all(not row["missed"] and row["difference"] < 1e-4 for row in said["rows"])
    assert first_difference(judged(verified)) == ""
    # Every layer took part.
    layers = torch.load(verified / "SP 2" / "record-1.pt")["layers"]
    assert layers.keys() == {f"model.layers.{index}" for index in range(4)}


@contextmanager
def edited(folder, rank=0):
    """A run's record, to be changed."""
    path = folder / f"record-{rank}.pt"
    record = torch.load(path)
    yield record
    torch.save(record, path)


def test_half_a_gradient_is_named(runs):
    with edited(runs / "SP 2") as record:
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
            record["gradients"][name] *= 0.5
    rows = {row.what: row for row in judged(runs)}
    row = rows["gradients, first step"]
    assert row.difference == pytest.approx(0.5, rel=1e-3) and len(row.missed) == 2
    # Backward, the later layer comes first.
    assert "model.layers.1.mlp.up_proj.weight is the first to differ" in first_difference(list(rows.values()))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_layer_that_differs_is_named(rank, runs):
    with edited(runs / "SP 2", rank) as record:
        for name in ("model.layers.2", "model.layers.3"):
            *_, outputs = record["layers"][name]
            outputs[:, -3] += 1.0  # one token; the last is padding
    assert first_difference(judged(runs)) == "The first layer whose output differs is model.layers.2."


def test_a_loss_that_is_no_number_differs(runs):
    with edited(runs / "SP 2") as record:
        record["loss"][1] = float("nan")
    row = judged(runs)[0]
    assert row.missed == ("step 2",) and row.place == "step 2"


def test_it_is_so_where_it_is_the_run_without_that_has_none(runs):
    with edited(runs / "SP 1") as record:
        record["loss"][0] = float("nan")
    assert judged(runs)[0].missed == ("step 1",)


def test_what_a_run_has_none_of_is_not_said_to_agree(runs, capsys):
    with edited(runs / "SP 1") as record:
        record["norm"] = [None] * 3  # as DeepSpeed at stage 0 in fp32
    assert show(judged(runs), runs, ["SP 1", "SP 2"], "") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "gradient norm" in line)
    assert "not" in row and "ok" not in row


def test_what_rounding_hides_is_said(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    other = Path(shutil.copytree(runs / "SP 1", runs / "SP 1 in fp32"))
    with edited(other) as record:
        record["gradients"]["model.layers.0.mlp.up_proj.weight"] *= 2.0
    rows = judge(runs, "SP 1", "SP 2", "SP 1 in fp32", sp_size=2)
    assert [row.num_hidden for row in rows] == [0, 0, 0, 1, 0]
    assert show(rows, runs, ["SP 1", "SP 2"], "") == 0
    said = capsys.readouterr().out
    assert "1 hidden by rounding" in " ".join(said.replace("│", " ").split()) and "without bf16 or fp16" in said


def test_ones_own_data_goes_into_a_small_vocabulary(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"input_ids": [5, 70_000, 3], "labels": [-100, 70_000, 3]}) + "\n")
    spec = Namespace(full=False, seq_len=203, data=str(tmp_path / "data.jsonl"))
    (sample,) = samples(spec, 160, 1)
    assert sample["input_ids"].tolist() == [5, 70_000 % 160, 3]
    assert sample["labels"].tolist() == [-100, 70_000 % 160, 3]


def test_a_folder_of_results_keeps_what_else_is_in_it(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "SP 1").mkdir()
    (tmp_path / "SP 1" / "record-0.pt").write_text("of an earlier comparison")
    words = ["verify", "--ds_config", str(ROOT / "ds_configs" / "sp2.json"), "--output", str(tmp_path)]
    assert main([*words, "--model", str(tmp_path / "no.json"), "--num_gpus", "2", "--", "train.py"]) == 2
    assert main([*words, "--", "train.py"]) == 2
    assert (tmp_path / "thesis.txt").read_text() == "mine" and not (tmp_path / "SP 1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "recipe", "arguments"),
    [
        ("train.py", "sp2.json", ["--seq-len", "301"]),
        ("hf_trainer.py", "trainer_sp2.json", ["--seq_len", "301"]),
    ],
)
def test_a_program_of_ones_own_is_verified(example, recipe, arguments, tmp_path, capsys):
    recipe = str(ROOT / "ds_configs" / recipe)
    program = [str(ROOT / "examples" / example), "--deepspeed", recipe, *arguments]
    if example == "hf_trainer.py":
        program += ["--output_dir", str(tmp_path / "trainer")]
    words = ["verify", "--ds_config", recipe, "--output", str(tmp_path / "out")]
    assert main([*words, "--num_gpus", "2", "--steps", "2", "--", *program]) == 0
    assert "SP 2 against SP 1: 2 ranks; 2 steps" in capsys.readouterr().out


def test_in_half_precision_a_third_run_says_what_rounding_is():
    rounding = {"loss": {"step 1": 1e-3, "step 2": 1e-6}, "gradients": {"a": 1e-2, "b": 2e-2, "c": 1e-9}}
    assert allowed("loss", "step 2", True, rounding) == pytest.approx(3e-3)
    assert allowed("gradients", "c", True, rounding) == pytest.approx(3e-2)
    assert allowed("gradients", "b", True, rounding) == pytest.approx(6e-2)
    # Without one, what it usually is; in fp32 next to nothing.
    assert allowed("gradients", "b", True, None) == 0.1 and allowed("gradients", "b", False, None) < 1e-3


# --- what is refused, in words


@pytest.mark.slow
def test_a_refused_model_is_refused_in_its_words(tmp_path, capsys):
    CONFIG_MAPPING["gpt2"](is_causal=False).to_json_file(tmp_path / "config.json")
    words = ["verify", "--model", str(tmp_path / "config.json"), "--ds_config", str(ROOT / "ds_configs" / "sp2.json")]
    assert main([*words, "--num_gpus", "2", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "is_causal" in error and "run.log" in error


@pytest.mark.parametrize(
    "ds_config, world_size, words",
    [
        ({"zero_optimization": {"stage": 1}}, 2, "nothing to verify"),
        (
            {"sequence_parallel_size": 2, "gradient_accumulation_steps": 3},
            2,
            "=3 is not a multiple of sequence_par",
        ),
        ({"sequence_parallel_size": 2, "alst": {}}, 3, "does not divide 3 ranks"),
        ({"sequence_parallel_size": 8}, 1, "two or more ranks"),
    ],
)
def test_what_cannot_be_compared_is_refused(ds_config, world_size, words):
    with pytest.raises(ConfigError, match=words):
        configs_of(ds_config, world_size)


WRONG = (None, True, [2], {"a": 1}, "text", -1, 0.5)
BLOCKS = (
    "sequence_parallel_size",
    "alst",
    "zero_optimization",
    "bf16",
    "gradient_accumulation_steps",
    "steps_per_print",
)


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("key", [*BLOCKS, "train_micro_batch_size_per_gpu", "optimizer", "fp16", "compile", "pipeline"])
def test_any_wrong_type_is_a_sentence_or_runs(key, value):
    try:
        _, configs = configs_of({"sequence_parallel_size": 2, "alst": {}, key: value}, 2)
    except ConfigError as error:
        assert key in str(error)
    else:
        assert all(builtin_config(each, Path("out"), small=True) for each in configs.values())


def test_wrong_types_are_named_all_at_once():
    with pytest.raises(ConfigError) as refused:
        configs_of({"sequence_parallel_size": [2], "alst": 5, "zero_optimization": 0}, 2)
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == [
        "sequence_parallel_size",
        "alst",
        "zero_optimization",
    ]


def test_progress_is_shown_while_a_program_runs(tmp_path, capsys, monkeypatch):
    import subprocess

    from deepspeed_alst.cli import launch

    own = subprocess.Popen
    program = f"print('rank 0: {launch.PROGRESS} SP 2: step 1 of 5', flush=True); print('noise')"
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(launch.subprocess, "Popen", lambda _, **options: own(command, **options))
    launch.launch([], 2, tmp_path / "log")
    start, step = capsys.readouterr().err.splitlines()
    assert start.startswith(f"{launch.PROGRESS} starting 2 ranks") and step == f"{launch.PROGRESS} SP 2: step 1 of 5"


def test_alsts_own_names_at_the_top_level_are_in_the_split_run_alone():
    _, configs = configs_of({"sequence_parallel_size": 2, "tiled_mlp_compute": True}, 2)
    whole, split = (builtin_config(each, Path("out"), small=True) for each in configs.values())
    assert "tiled_mlp_compute" not in whole and "alst" not in whole
    assert "tiled_mlp_compute" not in split and split["alst"]["tiled_mlp_compute"] == {"tile_tokens": 37}


def test_both_runs_see_the_same_samples_in_a_step():
    ds_config = {"sequence_parallel_size": 8, "gradient_accumulation_steps": 16, "alst": {}, "train_batch_size": 16}
    sp_size, configs = configs_of(ds_config, 4)
    assert sp_size == 4 and list(configs) == ["SP 1", "SP 4"]
    assert [each["gradient_accumulation_steps"] for each in configs.values()] == [2, 8]
    assert "alst" not in configs["SP 1"] and "train_batch_size" not in configs["SP 4"]
    assert ds_config["sequence_parallel_size"] == 8


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "give either --model CONFIG, or a program"),
        (["--model", "nowhere/config.json"], "nowhere/config.json: there is no such file"),
        (["--", "train.py"], "the program's arguments must have --deepspeed JSON"),
    ],
)
def test_a_command_that_makes_no_sense_says_so(words, said, tmp_path, capsys):
    command = ["verify", "--ds_config", str(ROOT / "ds_configs" / "sp2.json"), "--output", str(tmp_path), *words]
    assert main(command) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "changed"),
    [
        (["t.py", "--deepspeed", "a.json", "-x"], ["t.py", "--deepspeed", "b.json", "-x"]),
        (["t.py", "--deepspeed=a.json"], ["t.py", "--deepspeed=b.json"]),
        (
            ["t.py", "--deepspeed", "--deepspeed_config", "a.json"],
            ["t.py", "--deepspeed", "--deepspeed_config", "b.json"],
        ),
    ],
)
def test_the_programs_ds_config_is_found_in_every_form(program, changed):
    assert with_file(program, "b.json") == changed


@pytest.mark.parametrize("program", [["t.py"], ["t.py", "--deepspeed"], ["t.py", "--deepspeed", "-x"]])
def test_a_program_without_one_is_refused(program):
    with pytest.raises(ConfigError, match="must have --deepspeed JSON"):
        with_file(program, "b.json")

"""The example programs: train.py by DeepSpeed's launcher, one curve with and without sequence parallelism, and resumed.

The others run as they are in two ranks that are started once.
"""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from functools import partialmethod
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from deepspeed_alst.cli.launch import free_port, remove_shared_memory

ROOT = Path(__file__).parents[2]


def train(ranks, recipe: str, log: Path, *arguments: str) -> list[dict]:
    """Run the example on two ranks, by the launcher if none are given; the lines that it logs."""
    program = ["train.py", "--deepspeed", f"ds_configs/{recipe}.json", "--seq-len", "1000", "--log-file", str(log)]
    if ranks is None:
        launch(*program, *arguments)
    else:
        ranks.run(play, *program, *arguments)
    return [json.loads(line) for line in log.read_text().splitlines()]


def launch(script: str, *words: str) -> None:
    port = free_port()
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    command = [*launcher, f"examples/{script}", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    finally:
        remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ranks2):
    return train(ranks2, "sp1", tmp_path_factory.mktemp("sp1") / "log", "--steps", "4")


@pytest.mark.parametrize(
    ("by_launcher", "recipe", "later"),
    [
        (False, "sp2", "sp1"),
        *(
            pytest.param(True, name, later, marks=pytest.mark.slow)
            for name, later in (("sp2", "sp1"), ("sp2_zero3",) * 2)
        ),
    ],
)
def test_the_curve_is_that_of_sp1_and_goes_on_after_a_resume(by_launcher, recipe, later, whole, ranks2, tmp_path):
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint")]
    train(None if by_launcher else ranks2, recipe, tmp_path / "log", "--steps", "2", *checkpoint)
    resumed = train(ranks2, later, tmp_path / "log", "--steps", "4", *checkpoint)
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed, whole, strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 1e-4
        assert abs(ours["grad_norm"] - theirs["grad_norm"]) < 1e-3 * theirs["grad_norm"]
    # The curve falls: equal losses of an untrained model would prove little.
    assert resumed[-1]["loss"] < resumed[0]["loss"] - 0.5


def test_a_text_file_and_a_jsonl_file_are_read(tmp_path):
    text = (ROOT / "README.md").read_text()
    (tmp_path / "one.txt").write_text(text * 3)
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"text": text}) for _ in range(4)))
    sys.path.insert(0, str(ROOT / "examples"))
    from train import Documents, read_texts

    for name, count in (("one.txt", 1), ("two.jsonl", 4)):
        texts = read_texts(tmp_path / name)
        assert len(texts) == count
        data = Documents(texts, lambda text: list(text.encode()), 1000)
        assert all(500 <= len(sample["input_ids"]) <= 1000 for sample in data)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_plain_zero3_loop_loads_its_model_sharded(ranks, tmp_path):
    from benchmarks.cells import Cell, build_model, model_config

    build_model(model_config(Cell())).save_pretrained(tmp_path / "model")
    recipe = json.loads((ROOT / "ds_configs" / "sp2_zero3.json").read_text())
    recipe |= {"alst": {"tiled_mlp_compute": True}, "sequence_parallel_size": ranks}
    (tmp_path / "ds.json").write_text(json.dumps(recipe))
    port = free_port()
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", str(ranks), "--master_port", str(port)]
    program = [
        ROOT / "tests/programs/zero3_loop.py",
        "--deepspeed",
        tmp_path / "ds.json",
        "--model",
        tmp_path / "model",
    ]
    environment = {**os.environ, "PYTHONWARNINGS": "default::FutureWarning"}
    if ranks == 1:  # the launcher's environment without its processes
        launcher = [sys.executable]
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=300, env=environment)
    remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("sharded at load: True") == done.stdout.count("trained") == ranks
    # DeepSpeed's, on each rank as it loads the model and as it builds the engine; ops defined later would repeat it.
    assert done.stderr.count("FutureWarning: `torch.distributed.all_gather_into_tensor` is deprecated") <= 2 * ranks


# --- the other scripts


def play(script: str, *words: str) -> str:
    """Run a script as the launcher would, on this rank; what it prints."""
    from deepspeed import DeepSpeedEngine
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    io_of = DeepSpeedEngine.deepspeed_io
    printed = io.StringIO()
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(printed),
        mock.patch.object(sys, "argv", [script, *words]),
        mock.patch.object(dist, "destroy_process_group"),  # of the ranks, for the next script
        # Daemons cannot have the processes that DeepSpeed's loader would read in.
        mock.patch.object(DeepSpeedEngine, "deepspeed_io", partialmethod(io_of, num_local_io_workers=0)),
    ):
        runpy.run_path(f"examples/{script}", run_name="__main__")
    return printed.getvalue()


def losses_of(printed: str, key: str = "loss") -> list[float]:
    """The losses of a plain loop's lines, or of the Trainer's."""
    return [
        float(value)
        for value in re.findall(rf"^step .*?\b{key} (\S+)|'loss': '(\S+?)'", printed, re.M)
        for value in value
        if value
    ]


def test_terms_of_ones_own_are_right_beside_the_models_loss(ranks2):
    split, whole = (
        ranks2.run(play, "custom_loss.py", "--deepspeed", f"ds_configs/{name}.json", "--steps", "4")[0]
        for name in ("sp2", "sp1")
    )
    numbers = [[float(x) for x in re.findall(r"\d+\.\d+", each.partition("step   1/4")[2])] for each in (split, whole)]
    # Loss, the model's, two terms and the norm of four steps.
    assert len(numbers[0]) == 20 and numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=2e-4)
    assert numbers[0][15] < numbers[0][0] - 1 and numbers[0][18] > 0.1


def test_a_preference_loss_of_ones_own_is_that_of_sp1(ranks2):
    split, whole = (
        ranks2.run(play, "dpo.py", "--deepspeed", f"ds_configs/{name}.json", "--steps", "4")[0]
        for name in ("sp2", "sp1")
    )
    numbers = [losses_of(each) + losses_of(each, "norm") for each in (split, whole)]
    assert len(numbers[0]) == 8 and numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=2e-4)
    assert numbers[0][3] < numbers[0][0]


def test_a_model_is_evaluated_and_generates(ranks2):
    printed = ranks2.run(play, "evaluate_and_generate.py", "--deepspeed", "ds_configs/sp2_zero3.json")[0]
    assert printed.splitlines()[-1].endswith("abc -> defghijklm")
    assert float(re.findall(r"held-out loss (\S+)", printed)[-1]) < 0.5


@pytest.mark.slow
def test_a_run_goes_on_at_another_sp_degree_and_on_one_rank(ranks2, tmp_path):
    from benchmarks.ranks import Ranks

    words = ["resume.py", "--checkpoint", str(tmp_path), "--seq-len", "1000", "--deepspeed"]
    first = ranks2.run(play, *words, "ds_configs/sp2.json", "--steps", "2")[0]
    second = ranks2.run(play, *words, "ds_configs/sp1.json", "--steps", "4")[0]
    with Ranks(1) as alone:
        third = alone.run(play, *words, "ds_configs/sp1.json", "--steps", "6")[0]
    for printed in (second, third):
        saved, resumed = re.findall(r"held-out loss (\S+)", printed)
        assert float(saved) == pytest.approx(float(resumed), abs=2e-4)
    losses = losses_of(first + second + third)
    assert len(losses) == 6 and losses[-1] < losses[0] - 1


@pytest.mark.slow
def test_an_adapter_is_trained_saved_and_loaded(ranks2, tmp_path):
    printed = ranks2.run(play, "lora.py", "--deepspeed", "ds_configs/sp2.json", "--output", str(tmp_path))[0]
    losses = losses_of(printed)
    assert len(losses) == 10 and losses[-1] < losses[0] - 0.5
    assert "differ by 0.0e+00" in printed and (tmp_path / "adapter_config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["hf_trainer.py", "trl_sft_packed.py"])
def test_the_trainers_loss_falls(script, ranks2, tmp_path):
    words = ["--deepspeed", "ds_configs/trainer_sp2.json", "--output_dir", str(tmp_path), "--disable_tqdm", "true"]
    printed = ranks2.run(play, script, *words)[0]
    losses = losses_of(printed)
    assert len(losses) == 10 and losses[-1] < losses[0] - 1
    assert re.search(r"eval_loss += +[23]\.", printed) and (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_the_slurm_script_starts_the_ranks_of_two_nodes(tmp_path):
    # Two tasks of srun on this host, each with the number of its node.
    (tmp_path / "srun").write_text('#!/bin/bash\nSLURM_NODEID=1 "$@" & other=$!\nSLURM_NODEID=0 "$@" && wait $other\n')
    (tmp_path / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho 127.0.0.2\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    port = free_port()
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "GLOO_SOCKET_IFNAME": "lo",
        "RANKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(port - 15000),
        "USER": "nobody",
    }
    words = ["examples/train.py", "--deepspeed", "ds_configs/sp2.json", "--seq-len", "1000", "--steps", "2"]
    try:
        done = subprocess.run(
            ["examples/slurm.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
    finally:
        remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "step   2/2" in done.stdout and "2 ranks share a sequence" in done.stdout + done.stderr


def test_every_script_is_in_the_table_and_short():
    table = (ROOT / "examples" / "README.md").read_text()
    for path in (ROOT / "examples").iterdir():
        if path.suffix in (".py", ".sh"):
            assert f"[{path.name}]({path.name})" in table
            assert path.name == "train.py" or path.read_text().count("\n") <= 120, path

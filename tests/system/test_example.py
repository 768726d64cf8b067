"""The example program through DeepSpeed's launcher: one curve with and without sequence parallelism, and resumed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepspeed_alst.cli.launch import free_port, remove_shared_memory

ROOT = Path(__file__).parents[2]


def train(recipe: str, log: Path, *arguments: str) -> list[dict]:
    """Run the example on two ranks; the lines that it logs."""
    port = free_port()
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    program = ["examples/train.py", "--deepspeed", f"ds_configs/{recipe}.json", "--seq-len", "1000", "--log-file", log]
    try:
        done = subprocess.run([*launcher, *program, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    finally:
        remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train("sp1", tmp_path_factory.mktemp("sp1") / "log", "--steps", "4")


@pytest.mark.parametrize(
    ("recipe", "later"), [("sp2", "sp1"), pytest.param("sp2_zero3", "sp2_zero3", marks=pytest.mark.slow)]
)
def test_the_curve_is_that_of_sp1_and_goes_on_after_a_resume(recipe, later, whole, tmp_path):
    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint")]
    train(recipe, tmp_path / "log", "--steps", "2", *checkpoint)
    resumed = train(later, tmp_path / "log", "--steps", "4", *checkpoint)
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


def test_a_plain_zero3_loop_loads_its_model_sharded(tmp_path):
    from benchmarks.cells import Cell, build_model, model_config

    build_model(model_config(Cell())).save_pretrained(tmp_path / "model")
    recipe = json.loads((ROOT / "ds_configs" / "sp2_zero3.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(recipe))
    port = free_port()
    launcher = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    program = [
        ROOT / "tests/programs/zero3_loop.py",
        "--deepspeed",
        tmp_path / "ds.json",
        "--model",
        tmp_path / "model",
    ]
    done = subprocess.run([*launcher, *program], capture_output=True, text=True, timeout=300)
    remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("sharded at load: True") == 2 and done.stdout.count("trained") == 2

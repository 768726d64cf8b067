"""TRL's own training scripts, unchanged, by the launcher: they log the same with sequence_parallel_size as without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import trl

from benchmarks.cells import Cell
from benchmarks.trainer import trainer_config
from deepspeed_alst.cli.launch import free_port, remove_shared_memory
from tests.integrations.trl_runs import GENERATES, OPTIONS, compare_logs, log_of, rows, save_model, tokenizer
from tests.multimodal import processors

SCRIPTS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "reward": "Reward", "grpo": "GRPO", "rloo": "RLOO"}
SCRIPTS |= {"distillation": "Distillation"}


def run(script: str, sp_size: int, folder: Path, program: Path | None = None, **changed) -> list[dict]:
    """Run a script, or another program with its arguments, for two steps on two ranks; return what it logged."""
    output = folder / f"sp{sp_size}"
    (folder / "ds.json").write_text(json.dumps(trainer_config(Cell(stage=2), sp_size)), encoding="utf-8")
    options = OPTIONS | GENERATES.get(SCRIPTS[script], {}) | {"save_strategy": "steps", "save_steps": 2}
    options |= {"dtype": "float32", "use_cpu": True, "eval_strategy": "steps", "eval_steps": 1}
    if script in ("grpo", "rloo"):
        options["reward_funcs"] = "tests.integrations.trl_runs.reward_letters"
    if script == "dpo":
        options["precompute_ref_log_probs"] = True
    if script == "distillation":
        options["teacher_model_name_or_path"] = folder / "teacher"
    options |= changed
    paths = {"model_name_or_path": folder / "model", "dataset_name": folder / "data", "output_dir": output}
    words = [f"--{key}={value}" for key, value in {**paths, **options, "deepspeed": folder / "ds.json"}.items()]
    program = program or Path(trl.__file__).parent / "scripts" / f"{script}.py"
    port = free_port()  # of its own: another test may run beside it
    start = ["--num_gpus", "2", "--master_port", str(port), str(program)]
    launcher = [str(Path(sys.executable).parent / "deepspeed"), *start]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    environment = {**os.environ, **offline}
    try:
        done = subprocess.run(launcher + words, env=environment, capture_output=True, text=True, timeout=600)
    finally:
        remove_shared_memory(port)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ("2 ranks per sequence" in done.stdout + done.stderr) == (sp_size > 1)
    return log_of(output)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_of_trl_logs_the_same(script, tmp_path):
    name = SCRIPTS[script]
    save_model(tmp_path / "model", name)
    save_model(tmp_path / "teacher", name, seed=9)
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, count in (("train", 32), ("test", 4)):
        lines = "".join(json.dumps(row) + "\n" for row in rows(name, count))
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    whole, split = (run(script, sp_size, tmp_path) for sp_size in (1, 2))
    compare_logs(whole, split)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "images"), [("sft", "llava"), ("sft", "gemma3"), ("dpo", "llava")])
def test_a_script_of_trl_trains_a_model_of_images(script, images, tmp_path):
    processors.save_all(tmp_path, images, SCRIPTS[script])
    changed = {"precompute_ref_log_probs": False} if script == "dpo" else {}
    whole, split = (run(script, sp_size, tmp_path, **changed) for sp_size in (1, 2))
    compare_logs(whole, split)

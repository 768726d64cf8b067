"""Uncaught errors of several ranks: one sentence where all have the same, each rank's own where they differ."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from deepspeed_alst.cli.launch import free_port, remove_shared_memory

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, time
import deepspeed_alst
from deepspeed_alst.errors import ConfigError, DataError
rank = int(os.environ["RANK"])
time.sleep(0.5 * rank)
{body}
"""


def errors_of(body: str, **environment: str) -> str:
    """Run two ranks of one parent without torch; what both printed to one file. Both must fail."""
    with tempfile.TemporaryFile("w+") as log:
        ranks = [start(body, rank, log, **environment) for rank in range(2)]
        assert [rank.wait(timeout=60) for rank in ranks] == [1, 1]
        log.seek(0)
        return log.read()


def start(body: str, rank: int, log: Any, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        cwd=ROOT,
        env=os.environ | {"WORLD_SIZE": "2", "RANK": str(rank)} | environment,
        stderr=log,
        text=True,
    )


def test_the_same_error_is_printed_once():
    printed = errors_of("raise ConfigError('no such key')")
    assert printed.count("Error") == 1 and printed.endswith("deepspeed_alst.errors.ConfigError: no such key\n")


def test_ranks_with_logs_of_their_own_print_to_each():
    ranks = [start("raise ConfigError('no such key')", rank, subprocess.PIPE) for rank in range(2)]
    assert all(rank.communicate(timeout=60)[1].endswith("ConfigError: no such key\n") for rank in ranks)


def test_a_later_job_of_the_same_parent_prints_it_again():
    assert all(errors_of("raise ConfigError('no such key')").count("no such key") == 1 for _ in range(2))


def test_an_error_that_one_rank_found_is_printed_once_with_its_number():
    both = "error = DataError(f'rank 1: bad' if rank == 0 else 'bad'); error.only_rank = rank or None; raise error"
    printed = errors_of(both)
    assert printed.count("Error: ") == 1 and printed.endswith("DataError: rank 1: bad\n")
    printed = errors_of(both.replace("rank == 0", "rank == 1").replace("'rank 1", "'rank 0"))
    assert printed.count("Error: ") == 1 and printed.endswith("DataError: bad\n")


@pytest.mark.parametrize(
    "body",
    [
        "raise ConfigError(f'tiles of {rank}')",
        "raise (ConfigError if rank else DataError)('bad')",
        "raise ValueError('not of this package')",
    ],
)
def test_errors_that_differ_or_are_not_ours_are_printed_by_each_rank(body):
    assert errors_of(body).count("Error: ") == 2


def test_the_switch_prints_the_whole_traceback_on_each_rank():
    body = "def inner():\n    raise ConfigError('bad')\ninner()"
    printed = errors_of(body, DEEPSPEED_ALST_TRACEBACK="1")
    assert printed.count("in inner") == printed.count("ConfigError: bad") == 2


def test_the_cause_in_a_library_keeps_its_frames():
    printed = errors_of("try: json\nexcept NameError as cause: raise ConfigError('bad') from cause")
    assert printed.count("NameError: ") == 1 and printed.endswith("ConfigError: bad\n")


def test_a_program_that_catches_it_sees_it_unchanged():
    body = "try: raise ConfigError('bad')\nexcept ConfigError as error: sys.exit(0 if str(error) != 'bad' else 1)"
    assert not errors_of(body)


@pytest.mark.parametrize(
    ("script", "recipe", "change", "sentence"),
    [
        ("train.py", "sp2", {"alst": {"tiled_mlp": True}}, "alst.tiled_mlp: unknown key"),
        pytest.param(
            *("train.py", "sp2", {"sequence_parallel_size": 3}, "does not divide the world size (2 ranks)"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("hf_trainer.py", "trainer_sp2", {"alst": {"tiled_mlp": True}}, "alst.tiled_mlp: unknown key"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(
                "hf_trainer.py",
                "trainer_sp2",
                {"sequence_parallel_size": 3},
                "does not divide the world size (2 ranks)",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_launcher_of_a_program_ends_with_one_sentence(script, recipe, change, sentence, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(json.loads((ROOT / f"ds_configs/{recipe}.json").read_text()) | change))
    port, own = free_port(), ["--output_dir", str(tmp_path)] if script == "hf_trainer.py" else []
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    words = [f"examples/{script}", "--deepspeed", str(tmp_path / "ds.json"), *own]
    try:
        done = subprocess.run([*launcher, *words], cwd=ROOT, capture_output=True, text=True, timeout=300)
    finally:
        remove_shared_memory(port)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1 and done.stderr.count(sentence) == 1, done.stderr
    assert f'examples/{script}", line' in done.stderr

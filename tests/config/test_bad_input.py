"""Each mistake stops every rank, non-zero, with an error that names it; launcher or not. Nobody waits for a timeout."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from deepspeed_alst.cli.launch import free_port, remove_shared_memory
from tests.forked import Forked

PROGRAM = Path(__file__).parents[1] / "programs" / "plain_loop.py"
# Far short of the 10 minutes that a rank waits for another.
LIMIT_SECONDS = 200.0
LOCKED_BY_A_FILE = pytest.mark.skipif(
    not hasattr(cpp_extension, "FileBaton"), reason="from torch 2.14 on a killed build leaves no lock"
)


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


MISTAKES = {
    "world": r"sequence_parallel_size=3 does not divide the world size \(2 ranks\)\. Use one of \[1, 2\]",
    "key": r"alst\.memory_lean_layer: use true, false.*\n"
    r"alst\.pad_to_multiple: unknown key\. Did you mean 'pad_to_multiple_of'\?",
    "unsharded": r"not split over the ranks.*deepspeed_alst\.shard_dataloader\(loader, engine\)",
    "eager": r"attn_implementation='eager' is not available",
    "model": r"is_causal=False: only causal attention is verified",
    "identical": r"the first 4 batches are the same on all 2 ranks.*SequentialSampler.*DistributedSampler",
    "dataset": r"OSError: document 3 cannot be read",
}


def _environment(**changed: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "PYTHONWARNINGS": "ignore", **changed}


@pytest.fixture
def port():
    port = free_port()
    yield port
    remove_shared_memory(port)


def run_ranks(case: str, port: int, world_size: int = 2, **environment: str) -> list[tuple[int, str]]:
    """Exit status and output of each of the program's ranks."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    common |= {"LOCAL_SIZE": str(world_size), **environment}
    ranks = [
        Forked(PROGRAM, case, environment=_environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank in range(world_size)
    ]
    try:
        results = [rank.finish(LIMIT_SECONDS) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for _, output in results:
        assert re.search(r"^start$", output, re.M), f"the program did not come to its start:\n{output[-3000:]}"
    return results


# Each starts two processes; what the others say is tested where it is said, too.
QUICK = ("world",)


@pytest.mark.slow
def test_the_program_without_a_mistake_trains(port):
    for status, output in run_ranks("none", port):
        assert status == 0 and "trained" in output, output[-3000:]


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in MISTAKES])
def test_every_rank_stops_and_says_why_without_a_launcher(case, port):
    for status, output in run_ranks(case, port):
        assert status != 0
        assert re.search(MISTAKES[case], output), output[-3000:]


@pytest.mark.parametrize("case", [slow("world"), slow("unsharded"), slow("dataset")])
def test_the_launcher_stops_too(case, port):
    command = [Path(sys.executable).parent / "deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, str(PROGRAM), case], env=_environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode != 0
    assert re.search(MISTAKES[case], done.stdout + done.stderr), (done.stdout + done.stderr)[-3000:]


@LOCKED_BY_A_FILE
def test_a_stale_build_lock_is_an_error_that_says_where_it_is(tmp_path, port):
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    for status, output in run_ranks("none", port, TORCH_EXTENSIONS_DIR=str(tmp_path)):
        assert status != 0
        assert f"{lock} is left over from a build that was killed" in output and f"rm {lock}" in output
    assert lock.exists()


def test_a_lock_file_that_locks_nothing_is_not_stale(tmp_path, monkeypatch):
    """Torch 2.14 keeps the file of every build."""
    from deepspeed_alst.environment import check_build_lock

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delattr(cpp_extension, "FileBaton", raising=False)
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    check_build_lock()


@LOCKED_BY_A_FILE
def test_the_lock_of_a_build_that_runs_is_waited_for(tmp_path, monkeypatch):
    from deepspeed_alst.environment import check_build_lock
    from deepspeed_alst.errors import SetupError

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    check_build_lock()
    # As torch.utils.file_baton does it: the builder holds the file open.
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)
    check_build_lock()
    os.close(descriptor)
    with pytest.raises(SetupError):
        check_build_lock()


@LOCKED_BY_A_FILE
def test_the_lock_of_a_build_that_runs_is_known_behind_a_link_too(tmp_path, monkeypatch):
    from deepspeed_alst.environment import check_build_lock

    (tmp_path / "disk" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with open(tmp_path / "home" / "deepspeed_shm_comm" / "lock", "x"):
        check_build_lock()


@LOCKED_BY_A_FILE
def test_a_lock_that_is_about_to_be_given_back_is_not_stale(tmp_path, monkeypatch):
    from deepspeed_alst.environment import check_build_lock

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    # torch.utils.file_baton closes the file first and removes it then.
    lock.touch()
    threading.Timer(0.5, lock.unlink).start()
    check_build_lock()


@LOCKED_BY_A_FILE
@pytest.mark.slow
def test_a_stale_build_lock_is_an_error_where_zero_init_meets_it_first(tmp_path, port):
    """The config is on the command line, and ``from_pretrained`` starts DeepSpeed before ``initialize`` does."""
    from benchmarks.cells import Cell, build_model, model_config

    build_model(model_config(Cell())).save_pretrained(tmp_path / "model")
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    root = PROGRAM.parents[2]
    program = [PROGRAM.parent / "zero3_loop.py", "--deepspeed", root / "ds_configs" / "sp2_zero3.json"]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, *program, "--model", tmp_path / "model"],
        env=_environment(**rank, MASTER_PORT=str(port), TORCH_EXTENSIONS_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode != 0
    assert f"{lock} is left over from a build that was killed" in done.stderr

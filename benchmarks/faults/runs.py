"""Runs of benchmarks/faults/program.py through DeepSpeed's launcher, their outcomes, and small disks.

All processes, mounts and shared memory are cleaned up in every case.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch.distributed as dist

from benchmarks.faults.program import FAULT_RANK, Notes, train
from deepspeed_alst.cli.launch import free_port, remove_shared_memory

_ROOT = Path(__file__).parents[2]
_PROGRAM = Path(__file__).with_name("program.py")
_WORLD_SIZE = 2
_START_SECONDS = 240.0
MIB = 1 << 20


@dataclass(frozen=True)
class Curve:
    """Losses and weights that the ranks of a run reported, exact to the bit."""

    steps: dict[int, list[str]]
    """Losses of each step's micro-steps in hex, equal on all ranks."""
    weights: frozenset[str]
    """Digests of the ranks' weights; one if the run completed."""


@dataclass(frozen=True)
class End:
    """Outcome of a run."""

    output: str
    curve: Curve
    seconds: float | None
    """Time from the fault until the launcher and all ranks are gone; None without a fault."""


def run(
    folder: Path, ds_config: Path, arguments: Sequence[str], terminate: bool = False, seconds: float = 120.0
) -> End:
    """Start the program on two ranks and wait until all its processes are gone.

    Args:
        folder: for the ranks' notes and output; created here.
        ds_config: the JSON file.
        arguments: further arguments of the program.
        terminate: at the fault, send SIGTERM to all processes, as a preempting scheduler does.
        seconds: maximum wait after the fault; then the rest is killed, and ``seconds`` is infinite.
    """
    folder.mkdir(parents=True)
    port = free_port()
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(_WORLD_SIZE)]
    program = [str(_PROGRAM), "--deepspeed", str(ds_config), "--notes", str(folder), *arguments]
    command = [*launcher, "--master_port", str(port), *program]
    with (folder / "output").open("w") as output:
        # A separate session, to identify its processes.
        process = subprocess.Popen(
            command, cwd=_ROOT, env=_environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            spent = _wait(process, folder, terminate, seconds)
        finally:
            _kill(process)
            remove_shared_memory(port)
    return End((folder / "output").read_text(), curve_of(folder), spent)


def train_here(config: str, folder: str, load: str | None, save: str | None) -> None:
    """Run the same training without a fault, in ranks that are up already (benchmarks/ranks.py)."""
    paths = [None if each is None else Path(each) for each in (load, save)]
    train(config, Notes(Path(folder), dist.get_rank()), *paths)


def _environment() -> dict[str, str]:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **fixed, "PYTHONPATH": os.pathsep.join(paths)}


def _wait(process: subprocess.Popen[bytes], folder: Path, terminate: bool, seconds: float) -> float | None:
    """Wait until all processes are gone; return the seconds since the fault."""
    fault, start = folder / f"fault{FAULT_RANK}", time.time()
    fault_at = None
    while _alive(process):
        if fault_at is None and fault.exists():
            fault_at = float(fault.read_text())
            if terminate:
                fault_at = time.time()
                os.killpg(process.pid, signal.SIGTERM)
        if time.time() > (start + _START_SECONDS if fault_at is None else fault_at + seconds):
            return float("inf")
        time.sleep(0.02)
    if fault_at is None and fault.exists():
        fault_at = float(fault.read_text())
    return None if fault_at is None else time.time() - fault_at


def _members(session: int) -> list[psutil.Process]:
    """Return the session's live processes, stopped ones included."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def _alive(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None or bool(_members(process.pid))


def _kill(process: subprocess.Popen[bytes]) -> None:
    for each in _members(process.pid):
        with contextlib.suppress(psutil.Error):
            each.kill()  # stopped ones included
    process.wait()


def curve_of(folder: Path) -> Curve:
    """Read the ranks' notes from a folder; steps count if all ranks completed them.

    Raises:
        ValueError: the ranks' losses differ.
    """
    logs = []
    for rank in range(_WORLD_SIZE):
        path = folder / f"steps{rank}"
        lines = path.read_text().splitlines() if path.exists() else []
        logs.append({each["step"]: each["losses"] for each in map(json.loads, lines)})
    both = {step: losses for step, losses in logs[0].items() if all(step in log for log in logs)}
    if any(log[step] != losses for log in logs for step, losses in both.items()):
        raise ValueError(f"the ranks have different losses: {logs}")
    return Curve(both, frozenset(path.read_text() for path in folder.glob("weights?")))


@contextlib.contextmanager
def small_disk(size_bytes: int, kind: str) -> Iterator[Path | None]:
    """Mount a small "tmpfs" or loop-device "ext4" file system; yield None on failure."""
    with tempfile.TemporaryDirectory(prefix="small_disk_") as root:
        folder, image = Path(root) / "mount", Path(root) / "image"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]
        made = shutil.which("mount") is not None
        if made and kind == "ext4":
            with image.open("wb") as file:
                file.truncate(size_bytes)
            made = shutil.which("mkfs.ext4") is not None and _done(["mkfs.ext4", "-q", str(image)])
            command = ["mount", "-t", "ext4", "-o", "loop", str(image), str(folder)]
        if not (made and _done(command)):
            yield None
            return
        try:
            yield folder
        finally:
            # Lazy unmount: a process with an open file there does not block it.
            subprocess.run(["umount", "-l", str(folder)], check=True)


def _done(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0

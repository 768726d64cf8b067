"""Nine faults in training runs, each through DeepSpeed's launcher, and the recovery; ``make faults`` prints them.

Two ranks share a sequence at ZeRO 2 and save after every second step; rank 1 fails in step 4 of 5, or in its save. All
ranks stop in time, the output names the cause, and a run resumed from ``latest`` goes on to the bit.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from deepspeed_alst.checkpoint.load import verify
from deepspeed_alst.cli.launch import free_port, remove_shared_memory
from tests.programs.faulty import SAVE_EVERY, STEPS, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
TARGET_SECONDS, START_SECONDS = 60.0, 240.0
# Ranks time out after this long in the stalled run; then they wait 10 s for each rank to answer, and DeepSpeed's
# launcher gives a stopped process 30 s before it kills it.
STALL_TIMEOUT = 20.0
STALL_TARGET = STALL_TIMEOUT + 10.0 + 30.0 + 15.0
MIB = 1 << 20
FILES = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


@dataclass(frozen=True)
class Fault:
    """Fault and its expected outcome."""

    words: str
    program: tuple[str, ...]
    """Arguments of tests/programs/faulty.py."""
    says: str
    """Pattern that finds the cause in the output. Its group, if any, is shown in the table."""
    terminate: bool = False
    """Send SIGTERM to all processes at the fault, as a preempting scheduler does."""
    target: float = TARGET_SECONDS
    disk: str = ""
    """Content of the small disk: "checkpoints" or "layers"."""


# The launcher polls once a second and ends the others; the launcher or the peer reports it first.
_KILLED, _TERMINATED = r"rank 1 has ended|return code = -9", r"received SIGTERM|return code = -15"
_ROOM = r"OffloadError: .*(available: .* on disk)\."
_UNWRITTEN = r"CheckpointError: .*(global_step4 could not be written)"
_RAISED = "RuntimeError: rank 1 breaks in its own program"
_STALLED = "RankLostError: rank 1 does not answer within 10 s"
_NAN = "NonFiniteLossError: the loss is nan in optimizer step 4, micro-step 2"
FAULTS = {
    "kill": Fault("rank 1 is killed in a step", ("killed",), _KILLED),
    "kill-save": Fault("rank 1 is killed in a save", ("killed", "--in_save"), _KILLED),
    "raise": Fault("rank 1 raises in a step", ("raises",), _RAISED),
    "stall": Fault(
        "rank 1 is stopped in a step", ("stalled", "--timeout", str(STALL_TIMEOUT)), _STALLED, target=STALL_TARGET
    ),
    "disk-save": Fault("full disk in a save", ("disk", "--in_save"), _UNWRITTEN, disk="checkpoints"),
    "disk-layers": Fault("full disk for layer inputs", ("disk",), _ROOM, disk="layers"),
    "term": Fault("SIGTERM in a step", ("held",), _TERMINATED, terminate=True),
    "term-save": Fault("SIGTERM in a save", ("held", "--in_save"), _TERMINATED, terminate=True),
    "nan": Fault("a loss is NaN", ("nan",), _NAN),
}


def ds_config(nvme_path: Path | None) -> dict[str, Any]:
    """Return a ZeRO 2, SP 2 config, with layer inputs offloaded to a disk if given."""
    alst: dict[str, Any] = {}
    if nvme_path is not None:
        alst["activation_checkpoint_cpu_offload"] = {"nvme_path": str(nvme_path), "host_budget": 1, "keep_last": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "sequence_parallel_size": 2,
        "alst": alst,
    }


@dataclass(frozen=True)
class Curve:
    """Losses and weights that the ranks of a run reported, exact to the bit."""

    steps: dict[int, list[str]]
    """Losses of each step's micro-steps in hex, equal on all ranks."""
    weights: frozenset[str]
    """Digests of the ranks' weights; one if the run completed."""


def curve_of(folder: Path) -> Curve:
    """Read the ranks' notes from a folder; steps count if all ranks completed them.

    Raises:
        ValueError: the ranks' losses differ.
    """
    logs = []
    for path in (folder / "steps0", folder / "steps1"):
        lines = path.read_text().splitlines() if path.exists() else []
        logs.append({each["step"]: each["losses"] for each in map(json.loads, lines)})
    steps = sorted(logs[0].keys() & logs[1].keys())
    if any(logs[0][step] != logs[1][step] for step in steps):
        raise ValueError(f"the ranks have different losses: {logs}")
    return Curve(
        {step: logs[0][step] for step in steps}, frozenset(each.read_text() for each in folder.glob("weights?"))
    )


class Bench:
    """Working folder, ranks that stay up for fault-free runs, and the uninterrupted run."""

    def __init__(self, folder: Path, ranks: Any) -> None:
        self.folder, self._ranks = folder, ranks
        self.plain = self.write("plain", None)
        # It saves too, to measure the size of a checkpoint.
        self.whole = self.run_here("whole", save=str(folder / "size"))

    def run_here(self, name: str, load: str = "", save: str = "") -> Curve:
        folder = self.folder / name
        folder.mkdir(parents=True)
        self._ranks.run(train, str(self.plain), folder, load, save)
        return curve_of(folder)

    def write(self, name: str, nvme_path: Path | None) -> Path:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps(ds_config(nvme_path)))
        return path

    def size_of_a_checkpoint(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob(f"size/global_step{SAVE_EVERY}/*.pt"))

    def losses(self, steps: range) -> dict[int, list[str]]:
        return {step: self.whole.steps[step] for step in steps}


@pytest.fixture(scope="module")
def bench(ranks2, tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("faults"), ranks2)


@pytest.mark.parametrize("name", FAULTS)
def test_all_ranks_stop_in_time_and_a_resumed_run_goes_on_to_the_bit(name, bench):
    fault, folder, config = FAULTS[name], bench.folder / name, bench.plain
    arguments, checkpoints = ["--fault", *fault.program], folder / "checkpoints"
    with contextlib.ExitStack() as stack:
        if fault.disk == "checkpoints":
            size = bench.size_of_a_checkpoint() * 3 // 2
            checkpoints = stack.enter_context(small_disk(size, "tmpfs")) / "checkpoints"
        elif fault.disk == "layers":
            disk = stack.enter_context(small_disk(16 * MIB, "ext4"))
            config, arguments = bench.write(name, disk), [*arguments, "--fill", str(disk)]
        seconds, output = run(folder / "run", config, [*arguments, "--save", str(checkpoints)], fault)
        found, curve = re.search(fault.says, output), curve_of(folder / "run")
        assert found, output[-3000:]
        again = ", ".join(str(step) for step in curve.steps if step > SAVE_EVERY)
        print(
            f"\n{fault.words}: {seconds:.1f} s to stop (target: <= {fault.target:.0f}); "
            f"{found.group(found.re.groups)}; steps done again: {again}"
        )
        assert seconds <= fault.target
        assert not curve.weights  # it did not come to its end
        assert curve.steps == bench.losses(range(1, len(curve.steps) + 1))
        assert (checkpoints / "latest").read_text() == f"global_step{SAVE_EVERY}"
        for each in FILES:
            verify(checkpoints / f"global_step{SAVE_EVERY}" / each)
        rest = bench.run_here(f"{name}/resumed", load=str(checkpoints))
    assert rest.steps == bench.losses(range(SAVE_EVERY + 1, STEPS + 1))
    assert rest.weights == bench.whole.weights and len(rest.weights) == 1
    print(f"resumed from step {SAVE_EVERY}, bit-equal")


def run(folder: Path, config: Path, arguments: Sequence[str], fault: Fault) -> tuple[float, str]:
    """Start the program on two ranks and wait until all its processes are gone.

    Returns:
        Seconds from the fault until the end, infinite if they had to be killed; the output.
    """
    folder.mkdir(parents=True)
    port = free_port()
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)]
    command += [str(ROOT / "tests" / "programs" / "faulty.py"), "--config", str(config), "--notes", str(folder)]
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    with (folder / "output").open("w") as output:
        streams = {"stdout": output, "stderr": output}
        # A separate session, to identify its processes.
        process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=os.environ | fixed, start_new_session=True, **streams
        )
        try:
            seconds = _wait(process, folder / "fault", fault)
        finally:
            for each in _members(process.pid):
                with contextlib.suppress(psutil.Error):
                    each.kill()  # stopped ones included
            process.wait()
            remove_shared_memory(port)
    return seconds, (folder / "output").read_text()


def _wait(process: subprocess.Popen[bytes], mark: Path, fault: Fault) -> float:
    """Wait until all processes are gone; return the seconds since the fault."""
    fault_at, limit = None, time.time() + START_SECONDS
    while process.poll() is None or _members(process.pid):
        if fault_at is None and mark.exists():
            fault_at = mark.stat().st_mtime
            limit = fault_at + 2 * fault.target
            if fault.terminate:
                os.killpg(process.pid, signal.SIGTERM)
        if time.time() > limit:
            return float("inf")
        time.sleep(0.02)
    # Without a mark the fault never came.
    return time.time() - mark.stat().st_mtime if mark.exists() else float("nan")


def _members(session: int) -> list[psutil.Process]:
    """Return the session's live processes, stopped ones included."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(each.pid) == session and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


@contextlib.contextmanager
def small_disk(size_bytes: int, kind: str) -> Iterator[Path]:
    """Mount a small "tmpfs" or loop-device "ext4" file system.

    Raises:
        OSError: it cannot be mounted, as it takes root and mkfs.ext4.
    """
    with tempfile.TemporaryDirectory(prefix="small_disk_") as root:
        folder, image = Path(root) / "mount", Path(root) / "image"
        folder.mkdir()
        commands = [["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)]]
        if kind == "ext4":
            image.touch()
            os.truncate(image, size_bytes)
            commands = [["mkfs.ext4", "-q", str(image)], ["mount", "-t", "ext4", "-o", "loop", str(image), str(folder)]]
        for command in commands:
            if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode:
                raise OSError(f"no disk of {size_bytes} bytes can be mounted here: {' '.join(command)}")
        try:
            yield folder
        finally:
            # Lazy unmount: a process with an open file there does not block it.
            subprocess.run(["umount", "-l", str(folder)], check=True)

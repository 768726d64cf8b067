"""Conversion of a checkpoint for another number of ranks, done once by DeepSpeed's own converter.

``<tag>`` is converted to ``<tag>_universal`` beside it. The converter runs as a subprocess of rank 0 while all ranks
synchronize every few seconds, so that a conversion of an hour hits no collective's timeout.
"""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.checkpoint.constants import BASE_OPTIMIZER_STATE, OPTIMIZER_STATE_DICT

from deepspeed_alst.engine.checkpoint_files import check_files, read
from deepspeed_alst.engine.universal import is_universal
from deepspeed_alst.errors import CheckpointError
from deepspeed_alst.parallel.agreement import gather_objects, raise_together

_CONVERTER = "deepspeed.checkpoint.ds_to_universal"
# Runs the converter so that the kernel kills it and its workers when the parent process ends: PR_SET_PDEATHSIG is 1,
# and is not inherited. Another parent pid at the start means that the parent ended first.
_ENDS_WITH_ITS_PARENT = f"""
import ctypes, os, runpy, signal, sys

def end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

end_with_parent()
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the run that asked for this conversion has ended")
os.register_at_fork(after_in_child=end_with_parent)
runpy.run_module({_CONVERTER!r}, run_name="__main__", alter_sys=True)
"""
_MEETING_SECONDS = 2.0
_ADAMS_STATE = {"exp_avg", "exp_avg_sq"}
# Fingerprint of the source files, written last, into a folder that this package made.
_ORIGIN = "made_by_deepspeed_alst.json"


@dataclass(frozen=True)
class Source:
    """Checkpoint to convert."""

    load_dir: Path
    tag: str
    optimizer_files: tuple[Path, ...]
    """One file per rank that saved the checkpoint."""
    world_size: int
    """Number of ranks of this run."""

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.load_dir / self.tag

    @property
    def target(self) -> Path:
        """Folder of the universal checkpoint."""
        return self.load_dir / f"{self.tag}_universal"

    def arguments(self, target: Path) -> list[str]:
        """Return the converter's arguments; --inject_missing_state only adds missing entries."""
        return ["--input_folder", str(self.folder), "--output_folder", str(target), "--inject_missing_state"]

    def way_out(self) -> str:
        """Return the instructions for a conversion to another folder."""
        command = ["python", "-m", _CONVERTER, *self.arguments(Path("ELSEWHERE") / self.target.name)]
        return (
            f"To convert it to another folder: {shlex.join(command)}; then "
            f"engine.load_checkpoint('ELSEWHERE', tag='{self.target.name}')"
        )


def convert_together(source: Source, group: Any) -> str:
    """Convert on rank 0, or reuse an earlier conversion, while other ranks wait; return the tag to load.

    Raises:
        CheckpointError: on all ranks, with the remedy.
    """
    conversion = _Conversion(source) if dist.get_rank() == 0 else None
    try:
        raise_together(conversion.start() if conversion else None, group)
        while any(gather_objects(conversion is not None and conversion.is_running(), group)):
            pass
        raise_together(conversion.finish() if conversion else None, group)
    finally:
        if conversion:
            conversion.clean()
    return source.target.name


class _Conversion:
    """Rank 0's conversion: a subprocess fills a partial folder, which is renamed to the target once complete."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._partial = source.load_dir / f"{source.tag}_universal.partial"
        self._log = self._partial / "log"
        self._process: subprocess.Popen | None = None
        self._lock: int | None = None

    def start(self) -> CheckpointError | None:
        """Start the subprocess, unless a universal checkpoint of these files exists."""
        source = self._source
        saved_on = len(source.optimizer_files)
        why = f"deepspeed_alst: {source.folder} was saved on {saved_on} ranks and this run has {source.world_size}: "
        try:
            _check_convertible(source)
            if _is_fresh(source):
                print(f"{why}loading {source.target}, converted before", file=sys.stderr)
                return None
            _check_space(source)
            self._lock = _lock(self._partial)
            for each in self._partial.iterdir():  # left by a killed conversion
                if each.is_dir():
                    shutil.rmtree(each)
            print(f"{why}converting it, once, to {source.target}", file=sys.stderr)
            self._run()
        except CheckpointError as error:
            return error
        except OSError as error:
            return CheckpointError(f"{source.folder}: nothing can be written beside it ({error}). {source.way_out()}")
        except Exception as error:  # malformed files; the other ranks wait
            return CheckpointError(f"{source.folder} or {source.target} cannot be read: {error!r}")
        return None

    def _run(self) -> None:
        command = [sys.executable, "-c", _ENDS_WITH_ITS_PARENT, str(os.getpid())]
        command += self._source.arguments(self._partial / self._source.target.name)
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def is_running(self) -> bool:
        """Wait briefly for the subprocess; return True if it still runs."""
        if self._process is None:
            return False
        try:
            self._process.wait(_MEETING_SECONDS)
        except subprocess.TimeoutExpired:
            return True
        return False

    def finish(self) -> CheckpointError | None:
        """Rename the partial folder to the target; return the error, if any."""
        if self._process is None:
            return None
        source, made = self._source, self._partial / self._source.target.name
        try:
            if self._process.returncode or not is_universal(made):
                last = "\n".join(self._log.read_text(errors="replace").strip().splitlines()[-5:])
                return CheckpointError(
                    f"{source.folder} could not be converted to a universal checkpoint; DeepSpeed's converter ended "
                    f"with status {self._process.returncode}:\n{last}\n{source.way_out()}"
                )
            (made / _ORIGIN).write_text(json.dumps(_fingerprint(source)))
            shutil.rmtree(source.target, ignore_errors=True)
            made.rename(source.target)
            # The file that checkpoint.load_universal reads.
            (self._partial / "latest_universal").replace(source.load_dir / "latest_universal")
        except OSError as error:
            return CheckpointError(f"{source.target} could not be written: {error}. {source.way_out()}")
        return None

    def clean(self) -> None:
        """Kill the subprocess and remove the partial folder."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._lock is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _lock(folder: Path) -> int:
    """Make the folder of a conversion, and lock it for the lifetime of this process.

    Raises:
        CheckpointError: another conversion holds the lock.
    """
    folder.mkdir(exist_ok=True)
    # Locks the folder itself: a lock file would have to outlive the folder.
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(
            f"{folder}: another run converts this checkpoint right now. Start again when it is done, which that run's "
            "output says"
        ) from None
    except OSError:
        pass  # the file system does not support locks
    return lock


def _check_convertible(source: Source) -> None:
    check_files(source.optimizer_files)
    left = {each.name for each in source.folder.glob("*_optim_states.pt")} - {f.name for f in source.optimizer_files}
    if left:
        raise CheckpointError(
            f"{source.folder} was saved on {len(source.optimizer_files)} ranks but holds other optimizer files too, "
            f"left from an earlier save under the same tag; remove them: {', '.join(sorted(left))}"
        )
    # DeepSpeed stores torch's state dict under another key at ZeRO 3.
    saved = read(source.optimizer_files[0])[OPTIMIZER_STATE_DICT]
    state = saved.get(BASE_OPTIMIZER_STATE, saved.get(OPTIMIZER_STATE_DICT))["state"]
    missing = _ADAMS_STATE - set().union(*state.values())
    if missing:
        raise CheckpointError(
            f"{source.folder} was saved on {len(source.optimizer_files)} ranks and this run has {source.world_size}: "
            f"DeepSpeed's universal checkpoints hold Adam's state only, and this optimizer has no {min(missing)}. "
            f"Resume on {len(source.optimizer_files)} ranks, or load the weights alone: load_module_only=True"
        )


def _fingerprint(source: Source) -> dict[str, Any]:
    return {each.name: [each.stat().st_size, each.stat().st_mtime_ns] for each in source.optimizer_files}


def _is_fresh(source: Source) -> bool:
    """Return True if the target exists and was made from these files.

    Raises:
        CheckpointError: the target is outdated or not universal, and was not made by this package.
    """
    target, origin = source.target, source.target / _ORIGIN
    if not target.exists():
        return False
    if origin.is_file():
        return is_universal(target) and json.loads(origin.read_text()) == _fingerprint(source)
    newest = max(each.stat().st_mtime_ns for each in source.optimizer_files)
    if is_universal(target) and (target / "zero" / "optimizer_state.pt").stat().st_mtime_ns >= newest:
        return True
    raise CheckpointError(
        f"{target} is in the way: it is not a universal checkpoint of {source.folder} as it is now. Remove it, or load "
        f"it by its name: engine.load_checkpoint('{source.load_dir}', tag='{target.name}')"
    )


def _check_space(source: Source) -> None:
    """Raise CheckpointError if the disk lacks space for optimizer states written twice, in pieces and whole."""
    needed = 2 * sum(each.stat().st_size for each in source.optimizer_files)
    free = shutil.disk_usage(source.load_dir).free
    if free < needed:
        raise CheckpointError(
            f"{source.folder}: its conversion needs {needed / 2**30:.1f} GiB beside it, and {free / 2**30:.1f} GiB are "
            f"free. {source.way_out()}"
        )

"""Universal checkpoints, DeepSpeed's format for another number of ranks: conversion and complete loading.

DeepSpeed's own converter makes ``<tag>_universal`` beside ``<tag>``, once. It runs as a subprocess of rank 0 while all
ranks synchronize every few seconds, so that a long conversion hits no collective's timeout.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import constants

from deepspeed_alst.checkpoint.save import STAMP
from deepspeed_alst.distributed.collectives import agree, any_rank
from deepspeed_alst.errors import CheckpointError

_CONVERTER = "deepspeed.checkpoint.ds_to_universal"
# Has the kernel kill the converter and its workers when the parent process ends: PR_SET_PDEATHSIG is 1, and not
# inherited. Another parent pid at the start means that the parent ended first.
_ENDS_WITH_ITS_PARENT = f"""
import ctypes, os, runpy, signal, sys

def end_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)

end_with_parent()
if os.getppid() != int(sys.argv.pop(1)):
    sys.exit("the training run has ended")
os.register_at_fork(after_in_child=end_with_parent)
runpy.run_module({_CONVERTER!r}, run_name="__main__", alter_sys=True)
"""
_MEETING_SECONDS = 2.0
# Marks a folder that this package has made, and may replace.
_MADE_HERE = "made_by_deepspeed_alst"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Raise CheckpointError with the file's path for any error of reading it."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{path} is missing, truncated or damaged: {error!r}. Copy it again, or resume from another checkpoint; a "
            "run in another dtype has other file names"
        ) from error


def read(path: Path) -> Any:
    """Load a file with memory-mapped tensors; raise CheckpointError if it is missing or truncated."""
    with naming(path):
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def is_universal(folder: Path) -> bool:
    """Return True if a folder is a complete universal checkpoint, by the files that the converter writes last."""
    return (folder / "zero" / "optimizer_state.pt").is_file() and any(folder.glob("*_model_states.pt"))


def convert_together(model_file: Path, optimizer_files: Sequence[Path], world_size: int, group: Any) -> None:
    """Convert on rank 0, unless it has been done, while other ranks wait. Collective over a gloo group."""
    steps = convert(model_file, optimizer_files, world_size) if dist.get_rank() == 0 else (each for each in ())
    goes_on = True
    with contextlib.closing(steps):
        while goes_on:
            with agree(group, CheckpointError, f"{model_file.parent} cannot be converted"):
                mine = next(steps, False)
            goes_on = any_rank(mine, group)


def convert(model_file: Path, optimizer_files: Sequence[Path], world_size: int) -> Generator[bool, None, None]:
    """Convert a checkpoint, unless it has been done; yield every few seconds.

    Takes rank 0's model file, the optimizer files of all ranks that saved, and this run's world size.
    """
    folder = model_file.parent
    target = folder.with_name(f"{folder.name}_universal")
    partial = folder.with_name(f"{target.name}.partial")
    made, log = partial / target.name, partial / "log"
    why = f"{folder} was saved on {len(optimizer_files)} ranks and this run has {world_size}"
    _check_convertible(folder, optimizer_files, why)
    if target.exists() and _is_fresh(target, model_file):
        print(f"deepspeed_alst: {why}: loading {target}, converted before", file=sys.stderr)
        return
    # --inject_missing_state only adds what files have not that were saved without this package.
    arguments = ["--inject_missing_state", "--input_folder", str(folder), "--output_folder"]
    by_hand = shlex.join(["python", "-m", _CONVERTER, *arguments, f"ELSEWHERE/{target.name}"])
    way_out = f"To convert it to another folder: {by_hand}; then load_checkpoint('ELSEWHERE', tag='{target.name}')"
    try:
        with _locked(partial):
            print(f"deepspeed_alst: {why}: converting it, once, to {target}", file=sys.stderr)
            if status := (yield from _run([*arguments, str(made)], log)):
                last = "\n".join(log.read_text(errors="replace").strip().splitlines()[-5:])
                raise CheckpointError(
                    f"{folder} could not be converted to a universal checkpoint; DeepSpeed's converter ended with "
                    f"status {status}:\n{last}\n{way_out}"
                )
            (made / _MADE_HERE).touch()
            shutil.rmtree(target, ignore_errors=True)
            made.rename(target)
            # The file that checkpoint.load_universal reads.
            (partial / "latest_universal").replace(folder.with_name("latest_universal"))
    except OSError as error:
        raise CheckpointError(f"{folder.parent} is not writable ({error}). {way_out}") from error


def _run(arguments: list[str], log: Path) -> Generator[bool, None, int]:
    """Run the converter; return its exit status. It is killed when the generator is closed."""
    command = [sys.executable, "-c", _ENDS_WITH_ITS_PARENT, str(os.getpid()), *arguments]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_MEETING_SECONDS)
                yield True
        finally:
            process.kill()
    return process.returncode


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the empty folder of a conversion, lock it, and remove it in the end."""
    folder.mkdir(exist_ok=True)
    # Locks the folder itself: a lock file would have to outlive the folder.
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.ExitStack() as undone:
        undone.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another run is converting this checkpoint. Start again when it is done"
            ) from None
        except OSError:
            pass  # the file system does not support locks
        undone.callback(shutil.rmtree, folder, ignore_errors=True)
        for left in folder.iterdir():  # by a killed conversion
            shutil.rmtree(left, ignore_errors=True)
        yield


def _check_convertible(folder: Path, optimizer_files: Sequence[Path], why: str) -> None:
    different = sorted(each.name for each in {*optimizer_files} ^ {*folder.glob("*_optim_states.pt")})
    if different:
        raise CheckpointError(
            f"{why}, but its optimizer files are not those of {len(optimizer_files)} ranks. Missing, or of an earlier "
            f"save under the same tag and to be removed: {', '.join(different)}"
        )
    # DeepSpeed stores torch's state dict under another key at ZeRO 3.
    saved = read(optimizer_files[0])[constants.OPTIMIZER_STATE_DICT]
    state = saved.get(constants.BASE_OPTIMIZER_STATE, saved.get(constants.OPTIMIZER_STATE_DICT))["state"]
    if not {"exp_avg", "exp_avg_sq"} <= set().union(*state.values()):
        raise CheckpointError(
            f"{why}: DeepSpeed's universal checkpoints hold Adam states only. Resume on {len(optimizer_files)} ranks, "
            "or load the weights alone: load_module_only=True"
        )


def _is_fresh(target: Path, model_file: Path) -> bool:
    """Return True if a universal checkpoint is of the same save as a model file; False if it may be replaced."""

    def identity(path: Path) -> Any:
        # The converter copies the file, with its time.
        return read(path).get(STAMP) or (path.stat().st_size, path.stat().st_mtime_ns)

    copy = target / model_file.name
    if is_universal(target) and copy.is_file() and identity(copy) == identity(model_file):
        return True
    if not (target / _MADE_HERE).exists():
        raise CheckpointError(
            f"{target} exists, and is not the universal checkpoint of the current {model_file.parent}. Remove it, or "
            f"load it by its name: engine.load_checkpoint('{target.parent}', tag='{target.name}')"
        )
    return False


def restore_the_rest(engine: Any, model_file: Path, with_optimizer: bool) -> None:
    """Restore state that DeepSpeed 0.19.8 does not load correctly from a universal checkpoint. Collective.

    DeepSpeed leaves frozen weights and buffers unchanged; at ZeRO 3 all parameter groups get the first one's settings
    and share its step count, which each of them advances.
    """
    state, folder = read(model_file), model_file.parent
    trained, named = set().union(*state[constants.PARAM_SHAPES]), engine.module.named_buffers()
    if not engine.zero_optimization_partition_weights():
        named = chain(named, engine.module.named_parameters())
    else:
        _restore_frozen_shards(engine, folder, state)
    for name, x in named:
        if name in state["module"] and name not in trained:
            x.data.copy_(state["module"][name])
    if engine.zero_optimization_partition_weights() and with_optimizer:
        optimizer = engine.optimizer.optimizer
        groups = read(folder / "zero" / "optimizer_state.pt")[constants.PARAM_GROUPS]
        for group, settings in zip(optimizer.param_groups, groups, strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})
        for own in optimizer.state.values():
            if isinstance(own.get("step"), torch.Tensor):
                own["step"] = own["step"].clone()


def _restore_frozen_shards(engine: Any, folder: Path, state: dict[str, Any]) -> None:
    """Restore ZeRO 3's frozen weights from the shards that the ranks saved; all open them, so that none fails alone."""
    shapes = state[constants.FROZEN_PARAM_SHAPES] or {}
    frozen = [(name, param) for name, param in engine.module.named_parameters() if name in shapes]
    files = (f"zero_pp_rank_{r}_mp_rank_00_model_states.pt" for r in range(state["dp_world_size"] if frozen else 0))
    pieces = [read(folder / each)[constants.FROZEN_PARAM_FRAGMENTS] for each in files]
    for name, param in frozen:
        with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
            if dist.get_rank() == 0:
                whole = torch.cat([piece[name].flatten() for piece in pieces])
                param.data.copy_(whole[: param.numel()].view(shapes[name]))

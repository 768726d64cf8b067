"""``save_checkpoint`` that all ranks finish or all refuse, and a ``latest`` that names nothing but whole checkpoints.

DeepSpeed's rank 0 writes ``latest`` once its own files are there, whatever has become of the others'; and a rank that
cannot write leaves the others in a barrier. Here ``latest`` comes last, when every rank has written all of its files.
"""

import contextlib
import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepspeed_alst.engine.wrap import wrap_method
from deepspeed_alst.errors import CheckpointError
from deepspeed_alst.parallel.agreement import raise_together
from deepspeed_alst.words import in_words

_LATEST = "latest"


def saved_together(
    engine: Any, agreement_group: Callable[[], AbstractContextManager[Any]], save: Callable[..., Any]
) -> Callable[..., Any]:
    """``save_checkpoint`` of an engine that raises CheckpointError on all ranks if one could not write its files.

    ``agreement_group`` gives all ranks over gloo for the time of a call.
    """
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        given = arguments.arguments
        if not given["save_dir"] or engine.checkpoint_engine.is_decoupled():
            return save(*args, **kwargs)  # refused by DeepSpeed; written in the background, which says itself when
        names_latest, given["save_latest"] = given["save_latest"], False
        folder = Path(given["save_dir"])
        tag = f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])
        if dist.get_rank() == 0 and _latest(folder) == tag:
            # Written over, it is of two steps until all files are new. Others start after DeepSpeed's first barrier.
            (folder / _LATEST).unlink()
        with agreement_group() as group:
            errors: list[Exception] = []
            with _kept(engine, errors):
                result = save(*arguments.args, **arguments.kwargs)
            raise_together(_in_words(errors, folder, tag), group)
            if names_latest:
                raise_together(_name_latest(folder, tag) if dist.get_rank() == 0 else None, group)
        return result

    return save_checkpoint


@contextlib.contextmanager
def _kept(engine: Any, errors: list[Exception]) -> Iterator[None]:
    """Inside, what goes wrong with a file is kept in ``errors``: raised at once, it would leave the others waiting."""

    def keep(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def kept(*args: Any, **kwargs: Any) -> Any:
            try:
                # One file missing is enough: a full disk is not tried again.
                return None if errors else write(*args, **kwargs)
            except Exception as error:
                errors.append(error)

        return kept

    with contextlib.ExitStack() as undo:
        for owner, name in (
            (engine.checkpoint_engine, "makedirs"),
            (engine.checkpoint_engine, "save"),
            (engine, "_copy_recovery_script"),  # zero_to_fp32.py, by rank 0
        ):
            wrap_method(owner, name, keep, undo)
        yield


def _in_words(errors: list[Exception], folder: Path, tag: str) -> CheckpointError | None:
    if not errors:
        return None
    room = ""
    with contextlib.suppress(OSError):
        room = f" ({in_words(shutil.disk_usage(folder).free)} free there)"
    latest = _latest(folder)
    kept = f"{folder / _LATEST} still names {latest}" if latest else "there is no checkpoint before it"
    error = CheckpointError(
        f"{folder / tag} could not be written{room}: {errors[0]!r}. It is not whole, remove it; {kept}"
    )
    error.__cause__ = errors[0]
    return error


def _latest(folder: Path) -> str | None:
    path = folder / _LATEST
    return path.read_text().strip() if path.is_file() else None


def _name_latest(folder: Path, tag: str) -> CheckpointError | None:
    """Replace ``latest`` in one go: written in place, it would be empty for a moment, and stay so on a full disk."""
    new = folder / f"{_LATEST}.new"
    try:
        with new.open("w") as file:
            file.write(tag)
            file.flush()
            os.fsync(file.fileno())
        new.replace(folder / _LATEST)
    except OSError as error:
        return CheckpointError(f"{folder / tag} is whole, but {folder / _LATEST} could not be written: {error!r}")
    return None

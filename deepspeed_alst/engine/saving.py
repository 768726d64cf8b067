"""``save_checkpoint`` that succeeds or fails on all ranks, with a ``latest`` that only names complete checkpoints.

DeepSpeed's rank 0 writes ``latest`` after its own files, regardless of other ranks' files, and a rank that cannot write
leaves the others in a barrier. Here ``latest`` is written last, after every rank has written all of its files.
"""

import contextlib
import functools
import inspect
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.engine.checkpoint_files import STAMP, Stamp
from deepspeed_alst.engine.same_model import parameter_order
from deepspeed_alst.errors import CheckpointError
from deepspeed_alst.parallel.agreement import gather_objects, raise_together
from deepspeed_alst.words import in_words

_LATEST = "latest"


def save_on_all_ranks(engine: Any, save: Callable[..., Any], call: inspect.BoundArguments, group: Any) -> Any:
    """Save a checkpoint by DeepSpeed's ``save_checkpoint``.

    Args:
        engine: that saves it.
        save: DeepSpeed's own method.
        call: its arguments.
        group: all ranks over gloo.

    Raises:
        CheckpointError: on all ranks, if one could not write its files.
    """
    given = call.arguments
    stamp = _agree(engine, given, group)
    with _convertible(engine.module):
        if not given["save_dir"] or engine.checkpoint_engine.is_decoupled():
            return save(*call.args, **call.kwargs)  # refused by DeepSpeed; written in the background, which says when
        names_latest, given["save_latest"] = given["save_latest"], False
        folder, tag = Path(given["save_dir"]), _tag(engine, given)
        raise_together(_unname(folder, tag) if dist.get_rank() == 0 else None, group)
        errors: list[Exception] = []
        with _kept(engine, errors, stamp):
            result = save(*call.args, **call.kwargs)
    raise_together(_in_words(errors, folder, tag), group)
    if names_latest:
        raise_together(_name_latest(folder, tag) if dist.get_rank() == 0 else None, group)
    return result


@contextlib.contextmanager
def _convertible(module: Any) -> Iterator[None]:
    """Add the entry without which ds_to_universal refuses to convert a checkpoint of ZeRO 1 and 2.

    DeepSpeed writes it if the module has it, so that the caller's client_state stays the caller's.
    """
    with PatchSet() as patches:
        if not hasattr(module, UNIVERSAL_CHECKPOINT_INFO):
            info = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
            patches.set(module, UNIVERSAL_CHECKPOINT_INFO, info)
        yield


def _tag(engine: Any, given: dict[str, Any]) -> str:
    return f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])


def _agree(engine: Any, given: dict[str, Any], group: Any) -> Stamp:
    """Check that all ranks save the same checkpoint; return the stamp of this rank's files. Collective.

    Raises:
        CheckpointError: on all ranks, with the first rank that differs and the difference.
    """
    asked = {"tag": _tag(engine, given), "save_latest": bool(given["save_latest"])}
    if not engine.use_node_local_storage():
        asked["save_dir"] = os.path.abspath(given["save_dir"] or "")
    everyone = gather_objects((asked, uuid.uuid4().hex), group)
    first, save = everyone[0]
    for rank, (other, _) in enumerate(everyone):
        different = [
            f"{key}={first[key]!r} on rank 0, {other[key]!r} on rank {rank}"
            for key in first
            if first[key] != other.get(key)
        ]
        if different:
            raise CheckpointError(
                f"save_checkpoint: the ranks ask for different checkpoints ({'; '.join(different)}): each would miss "
                "the others' files. Make tag and folder of what all ranks have alike, such as the step"
            )
    return Stamp(save, dist.get_rank(), dist.get_world_size(), parameter_order(engine))


@contextlib.contextmanager
def _kept(engine: Any, errors: list[Exception], stamp: Stamp) -> Iterator[None]:
    """Stamp saved files, and collect errors in ``errors``: a raise would leave other ranks waiting."""

    def keep(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def kept(*args: Any, **kwargs: Any) -> Any:
            try:
                # No retry after the first error: the disk may be full.
                return None if errors else write(*args, **kwargs)
            except Exception as error:
                errors.append(error)

        return kept

    def stamped(write: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(write)
        def save(state_dict: dict[str, Any], path: str) -> Any:
            return write({**state_dict, STAMP: stamp.entry()}, path)

        return save

    with PatchSet() as patches:
        patches.wrap(engine.checkpoint_engine, "save", stamped)
        for owner, name in (
            (engine.checkpoint_engine, "makedirs"),
            # These assemble the state dict too, which fails on an unsuitable client_state.
            (engine, "_save_checkpoint"),
            (engine, "_save_zero_checkpoint"),
        ):
            patches.wrap(owner, name, keep)
        yield


def _in_words(errors: list[Exception], folder: Path, tag: str) -> CheckpointError | None:
    if not errors:
        return None
    room = ""
    with contextlib.suppress(OSError):
        room = f" ({in_words(shutil.disk_usage(folder).free)} free there)"
    latest = latest_tag(folder)
    kept = f"{folder / _LATEST} still names {latest}" if latest else "there is no checkpoint before it"
    error = CheckpointError(
        f"{folder / tag} could not be written{room}: {errors[0]!r}. It is not whole, remove it; {kept}"
    )
    error.__cause__ = errors[0]
    return error


def latest_tag(folder: Path, name: str = _LATEST) -> str | None:
    """Return the tag in a folder's ``latest`` file; None if there is no such file.

    Raises:
        CheckpointError: the file cannot be read as text.
    """
    path = folder / name
    try:
        return path.read_text().strip() if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} names no checkpoint: {error!r}. Write a tag into it, or remove it") from error


def _unname(folder: Path, tag: str) -> CheckpointError | None:
    """Remove a ``latest`` that names the tag to overwrite: until all files are new it is a mix of two steps."""
    try:
        if latest_tag(folder) == tag:
            (folder / _LATEST).unlink()
    except OSError as error:
        return CheckpointError(f"{folder / _LATEST} cannot be replaced: {error!r}")
    except CheckpointError as error:
        return error
    return None


def _name_latest(folder: Path, tag: str) -> CheckpointError | None:
    """Replace ``latest`` atomically: written in place, it would be empty briefly, or for good on a full disk."""
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

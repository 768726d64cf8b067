"""``save_checkpoint`` that succeeds or fails on all ranks, with a ``latest`` that only names complete checkpoints.

DeepSpeed's rank 0 writes ``latest`` after its own files alone, and a rank that cannot write leaves the others in a
barrier. Here ``latest`` is written after every rank has written all of its files.
"""

import contextlib
import inspect
import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.checkpoint import constants

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import agree, difference_over_ranks, gather_objects, raise_on_all_ranks
from deepspeed_alst.errors import CheckpointError

STAMP = "deepspeed_alst"
"""Key of this package's entry in DeepSpeed's files: id of the save, rank, world size, and parameter names by optimizer
group. In plain types, readable without this package."""

# The entry without which ds_to_universal refuses to convert a checkpoint of ZeRO 1 and 2.
_CONVERTIBLE = {
    constants.UNIVERSAL_CHECKPOINT_INFO: {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE
    }
}
_LATEST = "latest"


def save_on_all_ranks(engine: Any, save: Callable[..., Any], call: inspect.BoundArguments, group: Any) -> Any:
    """Save by DeepSpeed's ``save``; raise CheckpointError on all ranks if one could not write its files."""
    given = call.arguments
    folder, names_latest = Path(given["save_dir"] or ""), bool(given["save_latest"])
    tag = f"global_step{engine.global_steps}" if given["tag"] is None else str(given["tag"])
    asked = {"tag": tag, "save_latest": names_latest}
    if not engine.use_node_local_storage():
        asked["save_dir"] = os.path.abspath(folder)
    check_same("save_checkpoint", asked, group)
    # DeepSpeed refuses a missing folder; its asynchronous engines report themselves when a checkpoint is complete.
    if not given["save_dir"] or engine.checkpoint_engine.is_decoupled():
        return save(*call.args, **call.kwargs)
    first, latest = dist.get_rank() == 0, folder / _LATEST
    with agree(group, CheckpointError, f"{latest} cannot be replaced"):
        # A tag that is being overwritten has files of two steps.
        if first and latest_tag(folder) == tag:
            latest.unlink()
    given["save_latest"] = False
    stamp = {
        "save": gather_objects(uuid.uuid4().hex, group)[0],
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "order": parameter_order(engine),
    }
    with _errors_kept(engine, stamp) as errors:
        result = save(*call.args, **call.kwargs)
    raise_on_all_ranks(_not_written(errors[0], folder, tag) if errors else None, group)
    if names_latest:
        with agree(group, CheckpointError, f"{folder / tag} is complete, but {latest} could not be written"):
            if first:
                _name_latest(folder, tag)
    return result


def check_same(call: str, mine: dict[str, Any], group: Any) -> None:
    """Raise CheckpointError on all ranks if they ask for, or see, different things. Collective over a gloo group."""
    if difference := difference_over_ranks(mine, group):
        raise CheckpointError(
            f"{call}: the ranks ask for or see different checkpoints ({difference}). Use one shared folder, and "
            "the same tag on all ranks, such as the step"
        )


def parameter_order(engine: Any) -> list[list[str]] | None:
    """Return the names of the trained parameters by optimizer group, in the order of their states."""
    optimizer = engine.optimizer
    if optimizer is None:
        return None
    if engine.zero_optimization():
        return [list(shapes) for shapes in engine._get_zero_param_shapes()]
    # In half precision, the optimizer's own groups hold fp32 copies.
    groups = getattr(optimizer, "bf16_groups", None) or getattr(optimizer, "fp16_groups", None)
    groups = groups or [group["params"] for group in optimizer.param_groups]
    return [[engine.param_names.get(param) for param in group] for group in groups]


def latest_tag(folder: Path, name: str = _LATEST) -> str | None:
    """Return the tag in a folder's ``latest`` file, None without one; raise CheckpointError if it is not text."""
    path = folder / name
    try:
        return path.read_text().strip() if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}. Write a tag to it, or remove it") from error


def _name_latest(folder: Path, tag: str) -> None:
    """Replace ``latest`` atomically: a full disk would leave it empty."""
    new = folder / f"{_LATEST}.new"
    with new.open("w") as file:
        file.write(tag)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / _LATEST)


@contextlib.contextmanager
def _errors_kept(engine: Any, stamp: dict[str, Any]) -> Iterator[list[Exception]]:
    """Stamp saved files, and collect errors in a list: a raise would leave other ranks waiting."""
    errors: list[Exception] = []

    def stamped(write: Callable[..., Any], state_dict: Any, path: str) -> Any:
        return write({**_CONVERTIBLE, **state_dict, STAMP: stamp}, path)

    def keep(write: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            # No retry after the first error: the disk may be full.
            return None if errors else write(*args, **kwargs)
        except Exception as error:
            errors.append(error)

    with PatchSet() as patches:
        patches.wrap(engine.checkpoint_engine, "save", lambda write: partial(stamped, write))
        patches.wrap(engine.checkpoint_engine, "makedirs", lambda write: partial(keep, write))
        # These assemble the state dict too, which fails on an unsuitable client_state.
        for name in ("_save_checkpoint", "_save_zero_checkpoint"):
            patches.wrap(engine, name, lambda write: partial(keep, write))
        yield errors


def _not_written(cause: Exception, folder: Path, tag: str) -> CheckpointError:
    latest = latest_tag(folder)
    kept = f"{folder / _LATEST} still names {latest}" if latest else "there is no earlier checkpoint"
    error = CheckpointError(f"{folder / tag} could not be written: {cause!r}. It is incomplete, remove it; {kept}")
    error.__cause__ = cause
    return error

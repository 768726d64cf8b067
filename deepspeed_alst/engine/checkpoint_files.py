"""Checks of checkpoint files before they are read: complete, undamaged, and from one save."""

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspeed_alst.errors import CheckpointError

STAMP = "deepspeed_alst"
"""Key of this package's entry in DeepSpeed's files."""

_RANK_IN_NAME = re.compile(r"zero_pp_rank_(\d+)_mp_rank")


@dataclass(frozen=True)
class Stamp:
    """Identity of a checkpoint file: its save and the rank that wrote it."""

    save: str
    """Id shared by all files of one save and by no other file."""
    rank: int
    world_size: int
    order: tuple[tuple[str, ...], ...] | None = None
    """Parameter names by optimizer group, in order; None if unknown."""

    def entry(self) -> dict[str, Any]:
        """Return the stamp as plain types, readable without this package."""
        return dict(vars(self))


def read(path: Path) -> Any:
    """Load a file of torch.save with memory-mapped tensors.

    Raises:
        CheckpointError: the file is missing or truncated.
    """
    check_files([path])
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def stamp_of(state: Mapping[str, Any]) -> Stamp | None:
    """Return the stamp of a loaded file; None if it was saved without this package or before stamps existed."""
    return Stamp(**state[STAMP]) if STAMP in state else None


def check_files(paths: Iterable[Path]) -> None:
    """Raise CheckpointError if a file is missing or truncated.

    Raises:
        CheckpointError: names the first such file.
    """
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, or was saved in another dtype")
        # A zip file ends with its table of contents.
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short or damaged ({path.stat().st_size} bytes)")


def verify_share(folder: Path, with_optimizer: bool, rank: int, world_size: int) -> dict[str, Stamp | None]:
    """Verify the checksums of a rank's share of the files in one read; return the stamps found.

    A rank's own files are in its share, so that the next read finds them in memory; ranks split the common files.

    Raises:
        CheckpointError: names the first file that is damaged or has another rank's name.
    """
    files = [*sorted(folder.glob("*_model_states.pt"))]
    files += sorted(folder.glob("*_optim_states.pt")) * with_optimizer + sorted((folder / "zero").rglob("*.pt"))
    found = {}
    for index, path in enumerate(files):
        named = _RANK_IN_NAME.search(path.name)
        owner = int(named[1]) if named else index
        if owner % world_size != rank:
            continue
        _check_sums(path)
        if path.parent != folder:
            continue  # tensors of a universal checkpoint are identified by their path
        found[path.name] = stamp = stamp_of(read(path))
        if stamp is not None and named and stamp.rank != owner:
            raise CheckpointError(f"{path} is rank {stamp.rank}'s file under the name of rank {owner}'s")
    return found


def check_one_save(folder: Path, stamps: Mapping[str, Stamp | None]) -> None:
    """Raise CheckpointError if files of several saves are mixed, as after an interrupted overwrite.

    Files of ranks beyond the last save's world size are skipped: they belong to an earlier save and are never read.

    Raises:
        CheckpointError: names the first file that differs.
    """
    first, kept = next(iter(sorted(stamps.items())), ("", None))
    for name, stamp in sorted(stamps.items()):
        named = _RANK_IN_NAME.search(name)
        if kept is not None and named and int(named[1]) >= kept.world_size:
            continue
        if (stamp and stamp.save) != (kept and kept.save):
            raise CheckpointError(
                f"{folder}: {name} and {first} are not of the same save. The checkpoint was written over and not "
                "finished, or its files were mixed: resume from another one"
            )


def _check_sums(path: Path) -> None:
    """Verify a file against the checksums that torch.save stored in it."""
    check_files([path])
    if not torch.serialization.get_crc32_options():
        return  # the program disables torch.save's checksums
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: its part {damaged} does not have the checksum that it was saved with. Copy the file "
            "again, or resume from another checkpoint"
        )

"""The files of a checkpoint, looked at before they are read: whole, undamaged, and of one save."""

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepspeed_alst.errors import CheckpointError

STAMP = "deepspeed_alst"
"""The key under which a file of DeepSpeed's has this package's entry."""

_RANK_IN_NAME = re.compile(r"zero_pp_rank_(\d+)_mp_rank")


@dataclass(frozen=True)
class Stamp:
    """Which save a file is of, and whose it is there."""

    save: str
    """The same for all files of one save, and no other."""
    rank: int
    world_size: int
    order: tuple[tuple[str, ...], ...] | None = None
    """The names of the parameters by optimizer group, in order; None where it is not known."""

    def entry(self) -> dict[str, Any]:
        """The stamp in plain types, which a program without this package can read."""
        return dict(vars(self))


def read(path: Path) -> Any:
    """What torch.save wrote, its tensors still on disk.

    Raises:
        CheckpointError: missing, or cut short.
    """
    check_files([path])
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def stamp_of(state: Mapping[str, Any]) -> Stamp | None:
    """The stamp in what a file holds; None in one that was saved without this package, or before it had stamps."""
    return Stamp(**state[STAMP]) if STAMP in state else None


def check_files(paths: Iterable[Path]) -> None:
    """Refuse files that are missing or cut short.

    Raises:
        CheckpointError: with the first such file.
    """
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, or was saved in another dtype")
        # The table of contents is a zip's last piece.
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is cut short or damaged ({path.stat().st_size} bytes)")


def verify_share(folder: Path, with_optimizer: bool, rank: int, world_size: int) -> dict[str, Stamp | None]:
    """Read a rank's share of a checkpoint once and compare it with its checksums; returns the stamps found there.

    A rank's own files are in its share, so that the read that follows finds them in memory; files of all are dealt out.

    Raises:
        CheckpointError: with the first file that is damaged, or that has another rank's name.
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
            continue  # a tensor of a universal checkpoint, known by its path
        found[path.name] = stamp = stamp_of(read(path))
        if stamp is not None and named and stamp.rank != owner:
            raise CheckpointError(f"{path} is rank {stamp.rank}'s file under the name of rank {owner}'s")
    return found


def check_one_save(folder: Path, stamps: Mapping[str, Stamp | None]) -> None:
    """Refuse files of several saves, as they are left where one is written over and not finished.

    Files of more ranks than saved last are not looked at: they belong to an earlier save, and nobody reads them.

    Raises:
        CheckpointError: with the first that differs.
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
    """Compare a file with the checksums that torch.save put into it."""
    check_files([path])
    if not torch.serialization.get_crc32_options():
        return  # the program has torch.save leave them out
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

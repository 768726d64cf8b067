"""The files of a checkpoint, looked at before they are read."""

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from deepspeed_alst.errors import CheckpointError


def read(path: Path) -> Any:
    """What torch.save wrote, its tensors still on disk.

    Raises:
        CheckpointError: missing, or cut short.
    """
    check_files([path])
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


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

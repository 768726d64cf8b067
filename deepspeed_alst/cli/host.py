"""Report rows on the host: shared memory and the locked memory limit. Standard library only."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from deepspeed_alst.cli.rows import Row
from deepspeed_alst.words import in_words

_SHARED = Path("/dev/shm")
# DeepSpeed's CPU op creates one per rank, and 0.19 never removes it.
_BUFFERS = "deepspeed_allreduce_buffer_*"
_BUFFER_BYTES = 69_206_024
# NCCL, data loader workers and DeepSpeed's op share it; a container has 64 MiB by default.
_ENOUGH_SHARED_BYTES = 1 << 30
_ENOUGH_LOCKED_BYTES = 1 << 30


def rows() -> Iterator[Row]:
    """Yield rows on shared memory, leftover buffers in it, and the locked memory limit."""
    if _SHARED.is_dir():
        yield shared_memory_row(shutil.disk_usage(_SHARED).free)
        yield buffers_row(_SHARED)
    yield locked_memory_row(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def shared_memory_row(free_bytes: int) -> Row:
    """Check that /dev/shm has room for a run."""
    value = f"{in_words(free_bytes, 1)} free in {_SHARED}"
    remedy = "in a container: docker run --ipc=host, or --shm-size=16g; else remount it larger"
    if free_bytes < _BUFFER_BYTES:
        return Row("shared memory", f"{value}: too little for one rank's buffer on CPU", "problem", remedy)
    if free_bytes < _ENOUGH_SHARED_BYTES:
        return Row("shared memory", f"{value}: little for NCCL and the workers of data loaders", "note", remedy)
    return Row("shared memory", value)


def buffers_row(folder: Path) -> Row:
    """Report buffers of DeepSpeed's CPU op that no process maps; they hold memory until removed."""
    found = {str(path) for path in folder.glob(_BUFFERS)}
    used = _mapped(found) if found else set()
    left = sorted(found - used)
    if not left:
        return Row("shared buffers", f"{len(used)} in use, none left over" if used else "none left over")
    size = sum(os.stat(path).st_size for path in left if os.path.exists(path))
    several = f" and {len(left) - 1} more" if len(left) > 1 else ""
    return Row(
        "shared buffers",
        f"{in_words(size, 1)} left over by runs that have ended: {left[0]}{several}",
        "note",
        f"with no run on this host: rm {folder}/{_BUFFERS}",
    )


def locked_memory_row(limit_bytes: int) -> Row:
    """Report the locked memory limit, which bounds the disk tier's async I/O but not CUDA's pinned memory."""
    if limit_bytes == resource.RLIM_INFINITY:
        return Row("locked memory", "unlimited")
    value = f"{in_words(limit_bytes, 1)} may be locked (ulimit -l)"
    if limit_bytes < _ENOUGH_LOCKED_BYTES:
        return Row(
            "locked memory",
            f"{value}: little for the disk tier's buffers, which then go through system calls",
            "note",
            "ulimit -l unlimited; in a container: docker run --ulimit memlock=-1",
        )
    return Row("locked memory", value)


def _mapped(paths: set[str]) -> set[str]:
    """Return the files that some process has mapped, as far as this user has access."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        found |= {path for line in lines if (path := line.split(maxsplit=5)[-1]) in paths}
    return found

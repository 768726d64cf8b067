"""What a thread reads and writes a file with: system calls, here, or DeepSpeed's op (ops/aio.py)."""

import errno
import os
from typing import Protocol

import torch

PAGE_BYTES = 4096
"""What offsets, sizes and addresses are multiples of: O_DIRECT asks for 512 or 4096, by device."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Channel(Protocol):
    """What one thread reads and writes a file with; both calls last until it is done, and raise OSErrors."""

    def write(self, buffer: torch.Tensor, offset: int) -> None:
        """All bytes of the buffer, to the file from this offset on."""

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """All bytes of the buffer, from the file from this offset on."""


class SystemCalls:
    """A channel of preadv and pwritev, in which Python lets its other threads run.

    Args:
        descriptor: of an open file.
        direct: whether it is open with O_DIRECT. If not, what is written is sent to the disk at once and dropped from
            the page cache: errors come in the right place, and the cache does not take the memory that was to be saved.
    """

    def __init__(self, descriptor: int, direct: bool) -> None:
        self._descriptor = descriptor
        self._direct = direct

    def write(self, buffer: torch.Tensor, offset: int) -> None:
        """All bytes of the buffer, to the file from this offset on.

        Raises:
            OSError: the system's.
        """
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            done += _whole_pages(os.pwritev(self._descriptor, [view[done:]], offset + done), len(view) - done)
        if not self._direct:
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """All bytes of the buffer, from the file from this offset on.

        Raises:
            OSError: the system's, or EIO where the file ends too early.
        """
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            done += _whole_pages(os.preadv(self._descriptor, [view[done:]], offset + done), len(view) - done)
        if not self._direct:
            os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)


def advice(error: OSError) -> str:
    """The way out of an error of the disk, as a sentence."""
    if error.errno in _FULL:
        return "Free space there, name a larger disk, or raise host_budget, so that less goes to disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Name a folder that this user may write to"
    if error.errno in (errno.ENOTDIR, errno.ENOENT):
        return "Name a folder on a disk"
    return "Look for the disk's errors in the kernel's log (dmesg), or name another disk"


def _whole_pages(num_bytes: int, asked_bytes: int) -> int:
    """How far a call has come; after a short one the next goes on at a whole page, as O_DIRECT asks."""
    whole = num_bytes if num_bytes == asked_bytes else num_bytes - num_bytes % PAGE_BYTES
    if whole == 0:
        raise OSError(errno.EIO, f"the disk took or gave {num_bytes} of {asked_bytes} bytes")
    return whole

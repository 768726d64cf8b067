"""File I/O of one thread: by system calls (here) or by DeepSpeed's async I/O op (offload/aio.py)."""

import errno
import os
from typing import Protocol

import torch

PAGE_BYTES = 4096
"""Alignment of offsets, sizes and addresses: O_DIRECT requires 512 or 4096, depending on the device."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Channel(Protocol):
    """File I/O of one thread; both calls block until done and raise OSError."""

    def write(self, buffer: torch.Tensor, offset: int) -> None:
        """Write the whole buffer to the file at this offset."""

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill the buffer from the file at this offset."""


class SystemCalls:
    """Channel of preadv and pwritev, which release the GIL.

    Args:
        descriptor: an open file descriptor.
        direct: True if the file is open with O_DIRECT. If not, writes are flushed to disk and dropped from the page
            cache at once: errors surface at the right call, and the cache takes no memory.
    """

    def __init__(self, descriptor: int, direct: bool) -> None:
        self._descriptor = descriptor
        self._direct = direct

    def write(self, buffer: torch.Tensor, offset: int) -> None:
        """Write the whole buffer to the file at this offset.

        Raises:
            OSError: a system call failed.
        """
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            done += _whole_pages(os.pwritev(self._descriptor, [view[done:]], offset + done), len(view) - done)
        if not self._direct:
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """Fill the buffer from the file at this offset.

        Raises:
            OSError: a system call failed, or EIO if the file ends too early.
        """
        view = buffer.numpy().data
        done = 0
        while done < len(view):
            done += _whole_pages(os.preadv(self._descriptor, [view[done:]], offset + done), len(view) - done)
        if not self._direct:
            os.posix_fadvise(self._descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)


def advice(error: OSError) -> str:
    """Return the advice for a disk error, as a sentence."""
    if error.errno in _FULL:
        return "Free space there, name a larger disk, or raise host_budget, so that less goes to disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "Name a folder that this user may write to"
    if error.errno in (errno.ENOTDIR, errno.ENOENT):
        return "Name a folder on a disk"
    return "Look for the disk's errors in the kernel's log (dmesg), or name another disk"


def _whole_pages(num_bytes: int, asked_bytes: int) -> int:
    """Return the bytes transferred; round a short transfer down to whole pages, as O_DIRECT requires."""
    whole = num_bytes if num_bytes == asked_bytes else num_bytes - num_bytes % PAGE_BYTES
    if whole == 0:
        raise OSError(errno.EIO, f"the disk took or gave {num_bytes} of {asked_bytes} bytes")
    return whole

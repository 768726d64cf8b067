"""Disk tier of activation offload: space in a file of one process, read and written by system calls in threads."""

import contextlib
import errno
import os
import shlex
import threading
import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from deepspeed_alst.errors import AlstError, ConfigError, OffloadError
from deepspeed_alst.offload.disk_calls import DiskThreads, file_system, lengthen, open_unnamed, sentences, use_direct
from deepspeed_alst.offload.host_buffers import PAGE, pages

KEY = "alst.activation_checkpoint_cpu_offload.nvme_path"
# Bytes per call: enough for any disk's full rate, few enough to show progress in between.
_PIECE_BYTES = 16 << 20
_CLOSE_SECONDS = 10.0
# Every 509th word: at least one per page, and not always the same channels, as 509 is prime. Reads 2 bytes of 1,000.
_CHECKSUM_STRIDE = 509


class DiskFile:
    """Disk space for one rank's activations, freed whenever and however the process ends.

    Space is allocated in slots, reused by size; once none is in use, the file is empty again. ``allocate`` and
    ``reserve`` belong to one thread.

    Args:
        folder: an existing folder; it is not created.
        silence_seconds: a disk that makes no progress for this long is an error.

    Attributes:
        description: the folder, its file system and the mode of I/O, for the report.
        warning: a problem with the folder; empty if there is none.
        threads: they run ``read`` and ``write``.
        reserved_bytes: file size.

    Raises:
        ConfigError: the folder is missing, or cannot be written to or read from.
        OffloadError: the disk does not answer.
    """

    def __init__(self, folder: str | os.PathLike[str], silence_seconds: float = 120.0) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._label = f"{KEY}={str(self._folder)!r}"
        self.reserved_bytes = 0
        self._lock = threading.RLock()  # reentrant, as finalizers free slots at any point, in any thread
        self._end_bytes = 0
        self._used: dict[int, int] = {}  # size by offset
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets by size
        self.threads = DiskThreads(self._label, silence_seconds)
        try:
            self.threads.call(self._open)
        except AlstError:
            self.threads.close(0.0)
            raise
        # Also at interpreter exit: a thread that is in C++ while the interpreter ends aborts the process.
        self._finalizer = weakref.finalize(self, _end, self.threads, self._descriptor)

    @property
    def free_bytes(self) -> int:
        """Bytes free on the disk besides this file; 2**63 - 1 if its file system does not report them."""
        state = os.fstatvfs(self._descriptor)
        return state.f_bavail * state.f_frsize if state.f_blocks else 2**63 - 1

    def reserve(self, num_bytes: int) -> None:
        """Grow the file to at least this size before training, with its space reserved on disk.

        Raises:
            ConfigError: the disk does not have enough free space.
            OffloadError: the disk does not answer.
        """
        self.threads.call(self._grow, pages(num_bytes), ConfigError)

    def allocate(self, num_bytes: int) -> int:
        """Allocate a slot of whole pages and return its offset; grow the file if needed.

        Raises:
            OffloadError: the disk is full, or does not answer.
        """
        size = pages(num_bytes)
        with self._lock:
            if not self._used:
                self._end_bytes = 0
                self._free.clear()
            if self._free[size]:
                offset = self._free[size].pop()
                self._used[offset] = size
                return offset
        offset, end = self._end_bytes, self._end_bytes + size
        if end > self.reserved_bytes:
            self.threads.call(self._grow, end, OffloadError)
        self._used[offset], self._end_bytes = size, end
        return offset

    def free(self, offset: int) -> None:
        """Free a slot, after its transfers have ended."""
        with self._lock:
            self._free[self._used.pop(offset)].append(offset)

    def write(self, buffer_n: torch.Tensor, offset: int) -> int:
        """Write a buffer of whole pages to its slot and return its checksum; call it in ``threads``.

        Raises:
            OffloadError: the disk is full or fails.
        """
        self._transfer("writing", os.pwritev, buffer_n, offset)
        return checksum(buffer_n)

    def read(self, buffer_n: torch.Tensor, offset: int, written: int) -> None:
        """Read a slot of whole pages, whose data had the checksum ``written``; call it in ``threads``.

        Raises:
            OffloadError: the disk fails, or the data is not what was written.
        """
        self._transfer("reading", os.preadv, buffer_n, offset)
        if checksum(buffer_n) != written:
            raise OffloadError(
                f"{self._label}: {buffer_n.numel():,} bytes at {offset:,} came back different from what was written. "
                "A write has failed without a word, as on a broken disk: see the kernel's log (dmesg)."
            )

    def close(self) -> None:
        """Free the disk space and fail open transfers; a blocked thread delays that to the end of the process."""
        self._finalizer()

    def _open(self) -> None:
        folder = self._folder
        try:
            self._descriptor = open_unnamed(folder)
        except OSError as error:
            reason = sentences(error)
            if isinstance(error, FileNotFoundError) and not folder.exists():
                # Not created: a misspelt path or unmounted disk would put the file on the system disk.
                quoted = shlex.quote(str(folder))
                reason = f"there is no such folder. Mount its disk, or make it: mkdir -p {quoted}."
            raise ConfigError(f"{self._label}: {reason}") from error
        try:
            self._why_buffered = use_direct(self._descriptor)
            reserves = lengthen(self._descriptor, 0, PAGE)
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            os.close(self._descriptor)
            raise ConfigError(f"{self._label}: a test write failed: {sentences(error)}") from error
        kind = file_system(folder)
        how = f"buffered: no O_DIRECT there ({self._why_buffered})" if self._why_buffered else "O_DIRECT"
        room = "" if reserves else "; space cannot be set aside there, and may run out in training"
        in_memory = kind in ("tmpfs", "ramfs")
        self.description = f"{folder} ({kind}, {how}{room})"
        self.warning = f"{folder} is in memory ({kind}): what is offloaded there frees none" if in_memory else ""

    def _grow(self, size_bytes: int, kind: type[AlstError]) -> None:
        """Grow the file to at least this size; its size is unchanged if that fails, with an error of this kind."""
        needed = size_bytes - self.reserved_bytes
        if needed <= 0:
            return
        try:
            # Checked first, so that a far too large file does not briefly fill a shared disk.
            if self.free_bytes < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            lengthen(self._descriptor, self.reserved_bytes, size_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.reserved_bytes)
            more = f"activations need {needed:,} bytes more there, and {self.free_bytes:,} bytes are free"
            raise kind(f"{self._label}: {more}: {sentences(error)}") from error
        self.reserved_bytes = size_bytes

    def _transfer(self, doing: str, call: Callable[..., int], buffer_n: torch.Tensor, offset: int) -> None:
        """Run ``os.preadv`` or ``os.pwritev``, which release the GIL, until the whole buffer is transferred."""
        view, done = buffer_n.numpy().data, 0
        try:
            while done < len(view):
                piece = view[done : done + _PIECE_BYTES]
                self.threads.progress()
                moved = call(self._descriptor, [piece], offset + done)
                whole = moved if moved == len(piece) else moved - moved % PAGE  # O_DIRECT goes on at whole pages
                if whole == 0:
                    raise OSError(errno.EIO, f"the disk took or gave {moved} of {len(piece)} bytes")
                if self._why_buffered:  # now: errors surface at the right call, and the page cache takes no memory
                    if call is os.pwritev:
                        os.fdatasync(self._descriptor)
                    os.posix_fadvise(self._descriptor, offset + done, whole, os.POSIX_FADV_DONTNEED)
                done += whole
        except OSError as error:
            what = f"{doing} {len(view):,} bytes at {offset:,}"
            raise OffloadError(f"{self._label}: {what}: {sentences(error)}") from error


def checksum(buffer_n: torch.Tensor) -> int:
    """Compute a checksum over a sample of words from each page: 32 bits."""
    return zlib.crc32(buffer_n.view(torch.int64)[::_CHECKSUM_STRIDE].numpy().tobytes())


def _end(threads: DiskThreads, descriptor: int) -> None:
    """Stop the threads, and free the space unless the disk blocks one of them."""
    if threads.close(_CLOSE_SECONDS):
        os.close(descriptor)

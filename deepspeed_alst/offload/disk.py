"""Disk tier of activation offload: space in a file of one process, read and written by system calls in threads."""

import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import queue
import shlex
import tempfile
import threading
import time
import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import torch

from deepspeed_alst.core.threads import on_same_device
from deepspeed_alst.errors import AlstError, ConfigError, OffloadError
from deepspeed_alst.offload.host_buffers import PAGE, pages

KEY = "alst.activation_checkpoint_cpu_offload.nvme_path"
# A drive needs several concurrent transfers to reach its full rate.
_NUM_THREADS = 4
# Bytes per call: enough for any disk's full rate, few enough to show progress in between.
_PIECE_BYTES = 16 << 20
_CLOSE_SECONDS = 10.0
# Every 509th word: at least one per page, and not always the same channels, as 509 is prime. Reads 2 bytes of 1,000.
_CHECKSUM_STRIDE = 509
_CLOSED = (
    "alst.activation_checkpoint_cpu_offload: activations on disk were read after engine.destroy() freed them. Run the "
    "backward before it."
)
_WAY_OUT = (
    "Use a folder that this user may write to, on a disk with enough space, or raise host_budget to offload less to "
    "disk; a disk's own errors are in the kernel log (dmesg)."
)


class DiskThreads:
    """Threads that run jobs in FIFO order.

    They are daemons, unlike an executor's: a thread blocked in a disk call cannot be stopped, and the interpreter would
    wait for it at exit. Waiting for a job raises once no disk call makes progress for ``silence_seconds``.
    """

    def __init__(self, label: str, silence_seconds: float) -> None:
        self._label, self._silence_seconds = label, silence_seconds
        self._closed = False
        self._in_call: set[int] = set()  # threads in disk calls, by id
        self._last_progress = 0.0
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=on_same_device(self._work), name="alst-disk", daemon=True)
            for _ in range(_NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Queue a job that calls ``progress`` before each disk call; raise OffloadError if closed."""
        if self._closed:
            raise OffloadError(_CLOSED)
        future: Future[Any] = Future()
        self._jobs.put((future, job))
        return future

    def progress(self) -> None:
        """Report that a job is about to do a disk call; raise OffloadError if closed in the meantime."""
        self._last_progress = time.monotonic()
        self._in_call.add(threading.get_ident())
        if self._closed:
            raise OffloadError(_CLOSED)

    def wait(self, future: Future[Any]) -> Any:
        """Return or raise a job's result; raise OffloadError if the disk is silent for too long.

        Only time in which a job is in a disk call and this process runs counts.
        """
        silent, seen, poll = 0.0, 0.0, min(1.0, self._silence_seconds / 4)
        while not concurrent.futures.wait([future], timeout=poll).done:
            silent = silent + poll if self._in_call and seen == self._last_progress else 0.0
            seen = self._last_progress
            if silent >= self._silence_seconds:
                raise OffloadError(f"{self._label}: the disk has not answered for {silent:g} s. {_WAY_OUT}")
        return future.result()

    def close(self, seconds: float) -> bool:
        """Stop the threads and fail queued jobs; return True if all threads ended within the given time."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + seconds
        # One of them may call this, as it drops the last job and with it the last reference to the file.
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _work(self) -> None:
        while (each := self._jobs.get()) is not None:
            future, job = each
            try:
                result = job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            self._in_call.discard(threading.get_ident())
            del each, future, job  # they hold a buffer, and the next job may come much later


class DiskFile:
    """Disk space for one rank's activations in an existing folder, freed however the process ends.

    Space is allocated in slots, reused by size; once none is in use, the file is empty again. ``allocate`` and
    ``reserve`` belong to one thread. ``description`` has the folder, its file system and the mode of I/O.

    Raises:
        ConfigError: the folder is missing, or cannot be written to or read from.
        OffloadError: the disk does not answer for ``silence_seconds``.
    """

    def __init__(self, folder: str | os.PathLike[str], silence_seconds: float = 120.0) -> None:
        self._folder = Path(folder).expanduser().absolute()
        self._label = f"{KEY}={str(self._folder)!r}"
        self.reserved_bytes = 0
        self._end_bytes = 0  # of all slots
        self._lock = threading.RLock()  # reentrant, as finalizers free slots at any point, in any thread
        self._used: set[int] = set()  # offsets
        self._free: dict[int, list[int]] = defaultdict(list)  # offsets by size
        self.threads = DiskThreads(self._label, silence_seconds)
        try:
            self.threads.wait(self.threads.submit(self._open))
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
        """Grow the file to at least this size, reserved on disk; raise OffloadError if the disk is full."""
        self.threads.wait(self.threads.submit(functools.partial(self._grow, pages(num_bytes))))

    def allocate(self, size: int) -> int:
        """Allocate a slot of whole pages and return its offset; grow the file if needed, as in ``reserve``."""
        with self._lock:
            if not self._used:
                self._end_bytes = 0
                self._free.clear()
            offset = self._free[size].pop() if self._free[size] else self._end_bytes
        if offset + size > self.reserved_bytes:
            self.reserve(offset + size)
        self._end_bytes = max(self._end_bytes, offset + size)
        self._used.add(offset)
        return offset

    def free(self, offset: int, size: int) -> None:
        """Free a slot, after its transfers have ended."""
        with self._lock:
            self._used.discard(offset)
            self._free[size].append(offset)

    def write(self, buffer_n: torch.Tensor, offset: int) -> int:
        """Write a buffer of whole pages to its slot and return its checksum; call it in ``threads``."""
        self._transfer("writing", os.pwritev, buffer_n, offset)
        return checksum(buffer_n)

    def read(self, buffer_n: torch.Tensor, offset: int, written: int) -> None:
        """Read a slot of whole pages, whose data had the checksum ``written``; call it in ``threads``."""
        self._transfer("reading", os.preadv, buffer_n, offset)
        if checksum(buffer_n) != written:
            raise OffloadError(
                f"{self._label}: {buffer_n.numel():,} bytes at {offset:,} differ from what was written. A write failed "
                "silently, as on a broken disk: check the kernel log (dmesg)."
            )

    def close(self) -> None:
        """Free the disk space and fail open transfers; a blocked thread delays that to the end of the process."""
        self._finalizer()

    def _open(self) -> None:
        """Open a file without a name, whose space is freed when no process has it open, and test it by a write."""
        self.threads.progress()
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._descriptor = os.dup(file.fileno())
        except OSError as error:
            reason = f"{error.strerror}. {_WAY_OUT}"
            if isinstance(error, FileNotFoundError) and not self._folder.exists():
                # Not created: a misspelt path or unmounted disk would put the file on the system disk.
                reason = f"no such folder. Mount its disk, or run mkdir -p {shlex.quote(str(self._folder))}."
            raise ConfigError(f"{self._label}: {reason}") from error
        try:
            self._direct = _use_direct(self._descriptor)
            reserves = _lengthen(self._descriptor, 0, PAGE)
            os.ftruncate(self._descriptor, 0)
        except OSError as error:
            os.close(self._descriptor)
            raise ConfigError(f"{self._label}: a test write failed: {error.strerror}. {_WAY_OUT}") from error
        mounts = [each for each in psutil.disk_partitions(all=True) if self._folder.resolve().is_relative_to(each[1])]
        kind = max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else "unknown file system"
        how = "O_DIRECT" if self._direct else "buffered: O_DIRECT is not supported"
        space = "" if reserves else "; space cannot be reserved, and may run out in training"
        memory = "in memory, so that none is freed: " if kind in ("tmpfs", "ramfs") else ""
        self.description = f"{self._folder} ({memory}{kind}, {how}{space})"

    def _grow(self, size_bytes: int) -> None:
        """Grow the file to at least this size; its size is unchanged if that fails."""
        needed = size_bytes - self.reserved_bytes
        if needed <= 0:
            return
        self.threads.progress()
        try:
            # Checked first, so that a far too large file does not briefly fill a shared disk.
            if self.free_bytes < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            _lengthen(self._descriptor, self.reserved_bytes, size_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.reserved_bytes)
            needs = f"activations need {needed:,} more bytes, and {self.free_bytes:,} bytes are free"
            raise OffloadError(f"{self._label}: {needs}: {error.strerror}. {_WAY_OUT}") from error
        self.reserved_bytes = size_bytes

    def _transfer(self, verb: str, call: Callable[..., int], buffer_n: torch.Tensor, offset: int) -> None:
        """Run ``os.preadv`` or ``os.pwritev``, which release the GIL, until the whole buffer is transferred."""
        view, done = buffer_n.numpy().data, 0
        try:
            while done < len(view):
                piece = view[done : done + _PIECE_BYTES]
                self.threads.progress()
                moved = call(self._descriptor, [piece], offset + done)
                whole = moved if moved == len(piece) else moved - moved % PAGE  # O_DIRECT continues at a page
                if whole == 0:
                    raise OSError(errno.EIO, f"the disk transferred {moved} of {len(piece)} bytes")
                if not self._direct:  # now: errors surface at the right call, and the page cache takes no memory
                    if call is os.pwritev:
                        os.fdatasync(self._descriptor)
                    os.posix_fadvise(self._descriptor, offset + done, whole, os.POSIX_FADV_DONTNEED)
                done += whole
        except OSError as error:
            transfer = f"{verb} {len(view):,} bytes at {offset:,}"
            raise OffloadError(f"{self._label}: {transfer}: {error.strerror}. {_WAY_OUT}") from error


def checksum(buffer_n: torch.Tensor) -> int:
    """Return a 32-bit checksum over a sample of words from each page."""
    return zlib.crc32(buffer_n.view(torch.int64)[::_CHECKSUM_STRIDE].numpy().tobytes())


def _end(threads: DiskThreads, descriptor: int) -> None:
    """Stop the threads, and free the space unless the disk blocks one of them."""
    if threads.close(_CLOSE_SECONDS):
        os.close(descriptor)


def _use_direct(descriptor: int) -> bool:
    """Turn O_DIRECT on if a test write succeeds with it; raise OSError if none succeeds without it either."""
    flags, page = fcntl.fcntl(descriptor, fcntl.F_GETFL), mmap.mmap(-1, PAGE)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwritev(descriptor, [page], 0)
    except OSError:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        os.pwritev(descriptor, [page], 0)
        return False
    return True


def _lengthen(descriptor: int, begin: int, end: int) -> bool:
    """Reserve a file's blocks from ``begin`` to ``end``, else only extend it; return True if they were reserved.

    Not by posix_fallocate, which writes to every block of a file system without support for it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(descriptor, 0, ctypes.c_int64(begin), ctypes.c_int64(end - begin)) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            os.ftruncate(descriptor, end)
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True

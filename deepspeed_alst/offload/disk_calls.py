"""Calls to a disk that may hang, fail or lack a feature: threads with a time limit on waits, and an unnamed file."""

import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import psutil

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.host_buffers import PAGE

Result = TypeVar("Result")
# A drive needs several concurrent transfers to reach its full rate.
_NUM_THREADS = 4
_CLOSED = (
    "alst.activation_checkpoint_cpu_offload: what waits on disk was asked for after engine.destroy(), which gave the "
    "disk's space back. Run the backward before it."
)
# Short-lived name, for file systems without unnamed files; a crash before the unlink leaves the file behind.
_PREFIX = ".deepspeed-alst-offload-"
_NO_SUCH_CALL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskThreads:
    """Threads that run jobs in FIFO order.

    A thread blocked in a disk call cannot be stopped. So they are daemons: at exit, the interpreter would wait for an
    executor's threads.

    Args:
        label: beginning of errors.
        silence_seconds: without progress of any disk call for this long, whoever waits for a job gets an error.
    """

    def __init__(self, label: str, silence_seconds: float) -> None:
        self._label = label
        self._silence_seconds = silence_seconds
        self._lock = threading.Lock()
        self._closed = False
        self._in_call: set[int] = set()  # threads in disk calls, by id
        self._last_progress = 0.0
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name="alst-disk", daemon=True) for _ in range(_NUM_THREADS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Callable[[], Result]) -> "Future[Result]":
        """Queue a job; it calls ``progress`` before each disk call.

        Raises:
            OffloadError: already closed.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._closed:
                raise OffloadError(_CLOSED)
            self._jobs.put((future, job))
        return future

    def progress(self) -> None:
        """Report that a job is about to do a disk call.

        Raises:
            OffloadError: closed in the meantime, so that the job can stop.
        """
        self._last_progress = time.monotonic()
        self._in_call.add(threading.get_ident())
        if self._closed:
            raise OffloadError(_CLOSED)

    def wait(self, future: "Future[Result]") -> Result:
        """Return or raise a job's result.

        Raises:
            OffloadError: the disk was silent for too long. Time in which no job is in a disk call does not count, nor
                does time in which this process was suspended; a slow disk with a long queue is not silent.
        """
        silent, seen, poll = 0.0, 0.0, min(1.0, self._silence_seconds / 4)
        while not concurrent.futures.wait([future], timeout=poll).done:
            silent = silent + poll if self._in_call and seen == self._last_progress else 0.0
            seen = self._last_progress
            if silent >= self._silence_seconds:
                raise OffloadError(
                    f"{self._label}: the disk has not answered for {silent:g} s. Look for its errors in the kernel's "
                    "log (dmesg); name another disk, or train without nvme_path."
                )
        return future.result()

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Run a disk call in a thread, and return or raise its result; see ``wait``."""

        def job() -> Result:
            self.progress()
            return function(*args)

        return self.wait(self.submit(job))

    def close(self, seconds: float) -> bool:
        """Stop the threads and fail queued jobs; return True if all threads ended within the given time."""
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                if (dropped := self._jobs.get_nowait()) is not None:
                    dropped[0].set_exception(OffloadError(_CLOSED))
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + seconds
        # A thread of these may call this, when it drops the last job and with it the last reference to the file.
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


def open_unnamed(folder: Path) -> int:
    """Open an unnamed file, invisible to others, whose space is freed when no process has it open."""
    for left in folder.glob(f"{_PREFIX}*"):  # a live owner is about to unlink it too
        with contextlib.suppress(OSError):
            left.unlink()
    with contextlib.suppress(OSError):  # some network file systems do not support it
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    return descriptor


def use_direct(descriptor: int) -> str:
    """Turn O_DIRECT on if a test write succeeds with it; else return the reason why not.

    Raises:
        OSError: the file cannot be written either way.
    """
    flags, page = fcntl.fcntl(descriptor, fcntl.F_GETFL), mmap.mmap(-1, PAGE)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        os.pwritev(descriptor, [page], 0)
        return ""
    except OSError as error:
        if error.errno not in _NO_SUCH_CALL:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
        os.pwritev(descriptor, [page], 0)
        return error.strerror


def lengthen(descriptor: int, begin: int, end: int) -> bool:
    """Reserve a file's blocks from ``begin`` to ``end``, else only extend it; return True if they were reserved.

    posix_fallocate is unsuitable: without file system support it writes to every block.

    Raises:
        OSError: the disk has no room, or the file may not become that long.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.fallocate(descriptor, 0, ctypes.c_int64(begin), ctypes.c_int64(end - begin)) != 0:
        code = ctypes.get_errno()
        if code in _NO_SUCH_CALL:
            os.ftruncate(descriptor, end)
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system."""
    path = folder.resolve()
    mounts: list[Any] = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    # The last of equals is mounted over the others.
    return max(reversed(mounts), key=lambda each: len(each.mountpoint)).fstype if mounts else "unknown file system"


def sentences(error: OSError) -> str:
    """Return the reason and the advice of a disk error, as sentences."""
    if error.errno in _FULL:
        way_out = "Free space there, name a larger disk, or raise host_budget, so that less goes to disk"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        way_out = "Name a folder that this user may write to"
    elif error.errno in (errno.ENOTDIR, errno.ENOENT):
        way_out = "Name a folder on a disk"
    else:
        way_out = "Look for the disk's errors in the kernel's log (dmesg), or name another disk"
    return f"{error.strerror or error}. {way_out}."

"""Disk transfers in daemon threads, where every wait has a time limit.

A thread blocked in a disk call cannot be stopped. So joins have a time limit, and the threads are daemons, as the
interpreter waits for an executor's threads at exit.
"""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.channels import Channel, advice

Result = TypeVar("Result")
# Extra time per wait even for a silent disk: the process may have been suspended.
_GRACE_SECONDS = 1.0


class Transfer:
    """A read or write in flight."""

    def __init__(self, label: str, workers: "Workers") -> None:
        self._label = label
        self._workers = workers
        self._future: Future[None] = Future()
        self._begin = time.monotonic()

    @property
    def done(self) -> bool:
        """True if it has ended, with or without an error: ``wait`` returns or raises at once."""
        return self._future.done()

    def wait(self, seconds: float | None = None) -> None:
        """Block until the bytes are transferred.

        Args:
            seconds: limit on the disk's silence, the time without progress on any transfer of its file; None for the
                file's own limit. A slow disk with a long queue is not silent.

        Raises:
            OffloadError: the transfer failed, or the disk was silent for too long.
        """
        self.wait_ended(seconds)
        self._future.result()

    def wait_ended(self, seconds: float | None = None) -> None:
        """Block until the transfer has ended; like ``wait``, but ignore its error.

        Raises:
            OffloadError: the disk was silent for too long.
        """
        limit = self._workers.silence_seconds if seconds is None else seconds
        begin = time.monotonic()
        grace = min(_GRACE_SECONDS, limit)
        try:
            while not self.done:
                now = time.monotonic()
                sign = max(self._begin, self._workers.last_sign)
                left = max(sign + limit, begin + grace) - now
                if left <= 0:
                    raise OffloadError(
                        f"{self._label}: the disk has not answered for {now - sign:.0f} s. Look for its errors in the "
                        "kernel's log (dmesg); name another disk, or train without nvme_path."
                    )
                concurrent.futures.wait([self._future], timeout=left)
        finally:
            self._workers.count_waited(time.monotonic() - begin)

    def settle(self) -> None:
        """Block without a limit until the transfer has ended; for the worker threads only."""
        concurrent.futures.wait([self._future])

    def run(self, job: Callable[[Channel], None], channel: Channel) -> None:
        """Run the transfer in a worker thread."""
        try:
            job(channel)
        except BaseException as error:
            self.fail(error)
        else:
            self._future.set_result(None)

    def fail(self, error: BaseException) -> None:
        """End the transfer with this error; wrap an OSError in an OffloadError."""
        if isinstance(error, OSError):
            words = OffloadError(f"{self._label}: {error.strerror or error}. {advice(error)}.")
            words.__cause__ = error
            error = words
        self._future.set_exception(error)


class Workers:
    """Threads that run transfers in FIFO order, each with its own channel.

    Args:
        channels: one per thread.
        silence_seconds: time limit without progress on the disk.
    """

    def __init__(self, channels: Sequence[Channel], silence_seconds: float) -> None:
        self.silence_seconds = silence_seconds
        self.seconds_waited = 0.0
        self.last_sign = time.monotonic()
        self._lock = threading.Lock()
        self._closed = False
        self._jobs: queue.SimpleQueue[tuple[Transfer, Callable[[Channel], None]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=(channel,), name="alst-disk", daemon=True) for channel in channels
        ]
        for thread in self._threads:
            thread.start()

    def start(self, label: str, job: Callable[[Channel], None]) -> Transfer:
        """Queue a job; its errors begin with the label.

        Raises:
            OffloadError: already closed.
        """
        transfer = Transfer(label, self)
        with self._lock:
            if self._closed:
                raise OffloadError(f"{label}: the file is closed. Make a new one.")
            self._jobs.put((transfer, job))
        return transfer

    def sign(self) -> None:
        """Report progress of a transfer.

        Raises:
            OffloadError: closed in the meantime, so that the transfer can stop.
        """
        self.last_sign = time.monotonic()
        if self._closed:
            raise OffloadError("the file was closed during this transfer.")

    def count_waited(self, seconds: float) -> None:
        """Add to the seconds that training has waited for the disk."""
        with self._lock:
            self.seconds_waited += seconds

    def close(self, seconds: float) -> bool:
        """Stop the threads and fail open transfers; return True if all threads ended within the given time."""
        with self._lock:
            self._closed = True
        while True:
            try:
                dropped = self._jobs.get_nowait()
            except queue.Empty:
                break
            if dropped is not None:
                dropped[0].fail(OffloadError("the file was closed before this transfer began."))
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + seconds
        # A worker thread may call this, when it drops the last job and with it the last reference to the file.
        others = [thread for thread in self._threads if thread is not threading.current_thread()]
        for thread in others:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in others)

    def _work(self, channel: Channel) -> None:
        while (next_job := self._jobs.get()) is not None:
            transfer, job = next_job
            transfer.run(job, channel)
            self.last_sign = time.monotonic()
            del transfer, job, next_job  # they hold a buffer, and the next job may come much later


def within(seconds: float, label: str, call: Callable[[], Result]) -> Result:
    """Run a call that may hang, such as opening a file, and return or raise its result within a time limit.

    Raises:
        OffloadError: the call has not returned; its thread is abandoned.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="alst-disk-call", daemon=True).start()
    concurrent.futures.wait([future], timeout=seconds)
    if not future.done():
        raise OffloadError(
            f"{label}: the disk has not answered for {seconds:g} s. Look for its errors in the kernel's log (dmesg); "
            "name another disk, or train without nvme_path."
        )
    return future.result()

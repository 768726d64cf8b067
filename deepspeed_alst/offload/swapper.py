"""Transfers of offloaded tensors to disk and back through staging buffers on the host.

Legend: n bytes of a tensor in memory order.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import STAGING_BUFFERS, CopyStream, HostBufferPool, pages


@dataclass(eq=False)
class SwapHandle:
    """One tensor on disk."""

    offset: int
    num_bytes: int  # of its slot, whole pages
    writing: Future[int]  # its result is the checksum
    buffer_n: torch.Tensor | None = None  # staging buffer of the reading
    reading: Future[None] | None = None


class Swapper:
    """Transfers of tensors to disk and back through staging buffers on the host.

    A thread waits for the copy from the device, writes to disk, and releases the buffer. The computation overlaps with
    this and waits only while all buffers are in flight. Errors of a transfer are raised by the next call.
    """

    def __init__(self, file: DiskFile, copies: CopyStream | None = None, page_locked: bool = False) -> None:
        self.file = file
        self.staging = HostBufferPool(0, page_locked)  # its budget grows with the largest tensor
        self.seconds_waited = 0.0
        """Seconds that the computation has waited for the disk."""
        self._copies = copies or CopyStream()
        self._in_flight: list[Future[Any]] = []

    def swap_out(self, source_n: torch.Tensor) -> tuple[Any, SwapHandle]:
        """Start writing a tensor's bytes to disk; return the copy's event and the handle."""
        buffer_n = self._staging_buffer(source_n.numel())
        try:
            offset = self.file.allocate(buffer_n.numel())
        except OffloadError:
            self.staging.release(buffer_n)
            raise
        done = self._copies.start(source_n, buffer_n[: source_n.numel()])
        writing = self._submit(buffer_n, done, lambda: self.file.write(buffer_n, offset))
        return done, SwapHandle(offset, buffer_n.numel(), writing)

    def read_ahead(self, handle: SwapHandle) -> None:
        """Start reading a tensor from disk, if a staging buffer is free and leaves one of the largest size free."""
        largest = self.staging.budget // STAGING_BUFFERS
        fits = self.staging.in_use + handle.num_bytes + largest <= self.staging.budget
        if handle.reading is None and fits and (buffer_n := self.staging.acquire(handle.num_bytes)) is not None:
            self._read(handle, buffer_n)

    def swap_in(self, handle: SwapHandle, target_n: torch.Tensor) -> Any:
        """Start the copy of a tensor to the device; return the event to wait for."""
        if handle.reading is None:
            self._read(handle, self._staging_buffer(handle.num_bytes))
        assert handle.reading is not None and handle.buffer_n is not None
        self._wait(handle.reading)
        buffer_n, handle.buffer_n, handle.reading = handle.buffer_n, None, None
        done = self._copies.start(buffer_n[: target_n.numel()], target_n)
        self._submit(buffer_n, done, lambda: None)
        return done

    def free(self, handle: SwapHandle) -> None:
        """Free a tensor's disk space without blocking, as finalizers call this in any thread."""

        def free_slot(_: Future[Any]) -> None:
            if handle.buffer_n is not None:
                self.staging.release(handle.buffer_n)
                handle.buffer_n = None
            self.file.free(handle.offset, handle.num_bytes)

        (handle.reading or handle.writing).add_done_callback(free_slot)

    def close(self) -> None:
        """Close the file and fail queued transfers."""
        self.file.close()
        self.staging.close()

    def _read(self, handle: SwapHandle, buffer_n: torch.Tensor) -> None:
        def read() -> None:
            written = handle.writing.result()  # the data must be on disk first
            self.file.read(buffer_n[: handle.num_bytes], handle.offset, written)

        handle.buffer_n, handle.reading = buffer_n, self.file.threads.submit(read)
        self._in_flight.append(handle.reading)

    def _submit(self, buffer_n: torch.Tensor, done: Any, job: Callable[[], Any]) -> Future[Any]:
        """Run a job in a thread after the copy of a staging buffer, then release the buffer."""

        def run() -> Any:
            try:
                if done is not None:
                    done.synchronize()
                return job()
            finally:
                self.staging.release(buffer_n)

        future = self.file.threads.submit(run)
        self._in_flight.append(future)
        return future

    def _staging_buffer(self, num_bytes: int) -> torch.Tensor:
        """Return a staging buffer, waiting for the oldest transfers until one is free."""
        self.staging.budget = max(self.staging.budget, STAGING_BUFFERS * pages(num_bytes))
        while self._in_flight and self._in_flight[0].done():
            self._in_flight.pop(0).result()
        while (buffer_n := self.staging.acquire(num_bytes)) is None:
            self._wait(self._in_flight.pop(0))
        return buffer_n

    def _wait(self, transfer: Future[Any]) -> None:
        begin = time.perf_counter()
        try:
            self.file.threads.wait(transfer)
        finally:
            self.seconds_waited += time.perf_counter() - begin

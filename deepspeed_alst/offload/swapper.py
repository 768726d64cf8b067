"""Transfers of tensors to disk and back through a ring of host buffers.

A thread waits for the copy from the device, writes to disk, and returns the buffer. The computation overlaps with this
and waits only when all buffers are in flight. The next call raises the errors of earlier transfers.

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
from deepspeed_alst.offload.host_buffers import HostBufferPool, pages
from deepspeed_alst.offload.streams import Copies

RING = 4
"""Number of tensors of the largest size in flight at once."""


@dataclass(eq=False)
class SwapHandle:
    """One tensor on disk."""

    offset: int
    num_bytes: int
    """Bytes of its slot, whole pages."""
    writing: Future[int]
    """Its result is the checksum."""
    buffer_n: torch.Tensor | None = None
    """Buffer that it is read back into."""
    reading: Future[None] | None = None


class Swapper:
    """Transfers to and from one file.

    Args:
        file: the file on disk.
        ring: pool of the buffers; its budget becomes that of four of the largest tensor.
    """

    def __init__(self, file: DiskFile, ring: HostBufferPool) -> None:
        self.file = file
        self.ring = ring
        self.seconds_waited = 0.0
        """Seconds that the computation has waited for the disk."""
        self._under_way: list[Future[Any]] = []

    def out(self, source_n: torch.Tensor, copies: Copies) -> tuple[Any, SwapHandle]:
        """Start writing a tensor's bytes to disk; return the copy's event and the handle.

        Raises:
            OffloadError: the disk has no room, or an earlier transfer failed.
        """
        buffer_n = self._buffer(source_n.numel())
        try:
            offset = self.file.allocate(buffer_n.numel())
        except OffloadError:
            self.ring.give(buffer_n)
            raise
        done = copies.out(source_n, buffer_n[: source_n.numel()])

        def write() -> int:
            try:
                copies.wait_on_host(done)
                return self.file.write(buffer_n, offset)
            finally:
                self.ring.give(buffer_n)

        return done, SwapHandle(offset, buffer_n.numel(), self._send(write))

    def fetch(self, handle: SwapHandle) -> None:
        """Start reading a tensor from disk, if the ring has a buffer for it and one to spare."""
        fits = self.ring.in_use + 2 * handle.num_bytes <= self.ring.budget
        if handle.reading is None and fits and (buffer_n := self.ring.take(handle.num_bytes)) is not None:
            self._read(handle, buffer_n)

    def back(self, handle: SwapHandle, target_n: torch.Tensor, copies: Copies) -> Any:
        """Start the copy of a tensor to the device; return the event to wait for.

        Raises:
            OffloadError: a transfer failed.
        """
        if handle.reading is None:
            self._read(handle, self._buffer(handle.num_bytes))
        assert handle.reading is not None and handle.buffer_n is not None
        self._wait(handle.reading)
        buffer_n, handle.buffer_n, handle.reading = handle.buffer_n, None, None
        done = copies.back(buffer_n[: target_n.numel()], target_n)

        def give() -> None:
            try:
                copies.wait_on_host(done)
            finally:
                self.ring.give(buffer_n)

        self._send(give)
        return done

    def drop(self, handle: SwapHandle) -> None:
        """Free a tensor's disk space without blocking: finalizers call it in any thread."""

        def free(_: Future[Any]) -> None:
            if handle.buffer_n is not None:
                self.ring.give(handle.buffer_n)
                handle.buffer_n = None
            self.file.free(handle.offset)

        (handle.reading or handle.writing).add_done_callback(free)

    def close(self) -> None:
        """Close the file and fail queued transfers."""
        self.file.close()
        self.ring.close()

    def _read(self, handle: SwapHandle, buffer_n: torch.Tensor) -> None:
        handle.buffer_n = buffer_n

        def read() -> None:
            written = handle.writing.result()  # the data must be on disk first
            self.file.read(buffer_n[: handle.num_bytes], handle.offset, written)

        handle.reading = self._send(read)

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        """Take a ring buffer; wait for the oldest transfers until one is free."""
        self.ring.budget = max(self.ring.budget, RING * pages(num_bytes))
        while True:
            while self._under_way and self._under_way[0].done():
                self._under_way.pop(0).result()
            buffer_n = self.ring.take(num_bytes)
            if buffer_n is not None:
                return buffer_n
            assert self._under_way, "a buffer is neither under way nor in the ring"
            self._wait(self._under_way[0])

    def _wait(self, transfer: Future[Any]) -> None:
        begin = time.perf_counter()
        try:
            self.file.threads.wait(transfer)
        finally:
            self.seconds_waited += time.perf_counter() - begin

    def _send(self, job: Callable[[], Any]) -> Future[Any]:
        future = self.file.threads.submit(job)
        self._under_way.append(future)
        return future

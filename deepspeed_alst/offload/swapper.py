"""Transfers of tensors to disk and back through a ring of host buffers.

A thread waits for the copy from the device, then for the disk, and returns the buffer. The computation overlaps with
this and waits only when all buffers are in flight. The next call raises the errors of earlier transfers.

Legend: n bytes of a tensor in memory order.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import Buffer, HostBufferPool, pages
from deepspeed_alst.offload.streams import Copies

# Concurrent transfers: a drive needs several to reach its full rate.
_COURIERS = 4
RING = 4
"""Number of tensors of the largest size in flight at once."""


@dataclass(eq=False)
class SwapHandle:
    """One tensor on disk."""

    offset: int
    num_bytes: int
    writing: Future[None] | None = None
    buffer: Buffer | None = None
    """Buffer that it is read back into."""
    reading: Future[None] | None = None


class Swapper:
    """Transfers to and from one file.

    Args:
        file: the file on disk.
        ring: pool of the buffers; its budget becomes that of four of the largest tensor.
        groups_ahead: number of groups prefetched from disk ahead of the copies to the device.
    """

    def __init__(self, file: DiskFile, ring: HostBufferPool, groups_ahead: int = 2) -> None:
        self.file = file
        self.ring = ring
        self.groups_ahead = groups_ahead
        self.seconds_waited = 0.0
        """Seconds that the computation has waited for the disk."""
        self._couriers = ThreadPoolExecutor(_COURIERS, thread_name_prefix="alst-disk")
        self._under_way: list[Future[None]] = []
        self._closed = False

    def out(self, source_n: torch.Tensor, copies: Copies) -> tuple[Any, SwapHandle]:
        """Start writing a tensor's bytes to disk; return the copy's event and the ticket.

        Raises:
            OffloadError: the disk has no room, or an earlier transfer failed.
        """
        buffer = self._buffer(source_n.numel())
        try:
            ticket = SwapHandle(self.file.allocate(buffer.num_bytes), source_n.numel())
        except OffloadError:
            self.ring.give(buffer)
            raise
        done = copies.out(source_n, buffer.bytes_n[: source_n.numel()])

        def write() -> None:
            try:
                copies.wait_on_host(done)
                self.file.write(buffer.bytes_n, ticket.offset).wait()
            finally:
                self.ring.give(buffer)

        ticket.writing = self._send(write)
        return done, ticket

    def fetch(self, ticket: SwapHandle) -> None:
        """Start reading a tensor from disk, if the ring has a buffer for it and one to spare."""
        size = pages(ticket.num_bytes)
        if ticket.reading is None and self.ring.in_use + 2 * size <= self.ring.budget:
            buffer = self.ring.take(size)
            if buffer is not None:
                self._read(ticket, buffer)

    def back(self, ticket: SwapHandle, target_n: torch.Tensor, copies: Copies) -> Any:
        """Start the copy of a tensor to the device; return the event to wait for.

        Raises:
            OffloadError: a transfer failed.
        """
        if ticket.reading is None:
            self._read(ticket, self._buffer(ticket.num_bytes))
        assert ticket.reading is not None and ticket.buffer is not None
        self._wait(ticket.reading)
        buffer, ticket.buffer, ticket.reading = ticket.buffer, None, None
        done = copies.back(buffer.bytes_n[: target_n.numel()], target_n)

        def give() -> None:
            try:
                copies.wait_on_host(done)
            finally:
                self.ring.give(buffer)

        self._send(give)
        return done

    def drop(self, ticket: SwapHandle) -> None:
        """Free a tensor's disk space without blocking: finalizers call it in any thread."""
        assert ticket.writing is not None
        last = ticket.reading or ticket.writing

        def free(_: Future[None]) -> None:
            if ticket.buffer is not None:
                self.ring.give(ticket.buffer)
                ticket.buffer = None
            self.file.free(ticket.offset)

        last.add_done_callback(free)

    def close(self) -> None:
        """Close the file and cancel queued transfers."""
        self._closed = True
        self._couriers.shutdown(wait=False, cancel_futures=True)
        self.file.close()
        self.ring.close()

    def _read(self, ticket: SwapHandle, buffer: Buffer) -> None:
        writing = ticket.writing
        assert writing is not None
        ticket.buffer = buffer

        def read() -> None:
            writing.result()  # the data must be on disk first
            self.file.read(buffer.bytes_n, ticket.offset).wait()

        ticket.reading = self._send(read)

    def _buffer(self, num_bytes: int) -> Buffer:
        """Take a ring buffer; wait for the oldest transfers until one is free."""
        self.ring.budget = max(self.ring.budget, RING * pages(num_bytes))
        while True:
            self._raise_what_failed()
            buffer = self.ring.take(num_bytes)
            if buffer is not None:
                return buffer
            assert self._under_way, "a buffer is neither under way nor in the ring"
            self._wait(self._under_way[0])

    def _wait(self, transfer: Future[None]) -> None:
        begin = time.perf_counter()
        try:
            transfer.result()
        finally:
            self.seconds_waited += time.perf_counter() - begin

    def _send(self, work: Any) -> Future[None]:
        if self._closed:
            raise OffloadError(
                "alst.activation_checkpoint_cpu_offload: what waits on disk was asked for after engine.destroy(), "
                "which gave the disk's space back. Run the backward before it."
            )
        future = self._couriers.submit(work)
        self._under_way.append(future)
        return future

    def _raise_what_failed(self) -> None:
        while self._under_way and self._under_way[0].done():
            self._under_way.pop(0).result()

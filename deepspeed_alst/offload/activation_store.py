"""Store of offloaded activations: on the host, and on disk if the host has no room.

Tensors are grouped by call of a checkpointed layer. The backward takes the groups in reverse: the first request to a
group prefetches the one before it. At most two groups are on the device at once in either direction.
Legend: n bytes of a tensor in memory order.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.attention_cache import is_dense, laid_flat
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import RING, Copies, HostBufferPool, pages
from deepspeed_alst.profiler.owners import owner

# Groups that are read from disk ahead of the copies to the device.
_GROUPS_AHEAD = 2


@dataclass
class Counts:
    """Bytes moved by a store."""

    bytes_out: int = 0
    bytes_back: int = 0
    bytes_to_disk: int = 0


@dataclass(eq=False)
class SwapHandle:
    """One tensor on disk."""

    offset: int
    num_bytes: int  # of its slot, whole pages
    writing: Future[int]  # of the checksum
    buffer_n: torch.Tensor | None = None  # that it is read back into
    reading: Future[None] | None = None


class Swapper:
    """Transfers of tensors to disk and back through a ring of host buffers.

    A thread waits for the copy from the device, writes to disk, and returns the buffer. The computation overlaps with
    this and waits only when all buffers are in flight. The next call raises the errors of earlier transfers.
    """

    def __init__(self, file: DiskFile, copies: Copies | None = None, page_locked: bool = False) -> None:
        self.file = file
        self.ring = HostBufferPool(0, page_locked)  # its budget becomes that of RING of the largest tensor
        self.seconds_waited = 0.0
        """Seconds that the computation has waited for the disk."""
        self._copies = copies or Copies()
        self._under_way: list[Future[Any]] = []

    def out(self, source_n: torch.Tensor) -> tuple[Any, SwapHandle]:
        """Start writing a tensor's bytes to disk; return the copy's event and the handle."""
        buffer_n = self._buffer(source_n.numel())
        try:
            offset = self.file.allocate(buffer_n.numel())
        except OffloadError:
            self.ring.give(buffer_n)
            raise
        done = self._copies.out(source_n, buffer_n[: source_n.numel()])
        writing = self._send(buffer_n, done, lambda: self.file.write(buffer_n, offset))
        return done, SwapHandle(offset, buffer_n.numel(), writing)

    def fetch(self, handle: SwapHandle) -> None:
        """Start reading a tensor from disk, if the ring has a buffer for it and one to spare."""
        fits = self.ring.in_use + 2 * handle.num_bytes <= self.ring.budget
        if handle.reading is None and fits and (buffer_n := self.ring.take(handle.num_bytes)) is not None:
            self._read(handle, buffer_n)

    def back(self, handle: SwapHandle, target_n: torch.Tensor) -> Any:
        """Start the copy of a tensor to the device; return the event to wait for."""
        if handle.reading is None:
            self._read(handle, self._buffer(handle.num_bytes))
        assert handle.reading is not None and handle.buffer_n is not None
        self._wait(handle.reading)
        buffer_n, handle.buffer_n, handle.reading = handle.buffer_n, None, None
        done = self._copies.back(buffer_n[: target_n.numel()], target_n)
        self._send(buffer_n, done, lambda: None)
        return done

    def drop(self, handle: SwapHandle) -> None:
        """Free a tensor's disk space without blocking: finalizers call it in any thread."""

        def free(_: Future[Any]) -> None:
            if handle.buffer_n is not None:
                self.ring.give(handle.buffer_n)
                handle.buffer_n = None
            self.file.free(handle.offset, handle.num_bytes)

        (handle.reading or handle.writing).add_done_callback(free)

    def close(self) -> None:
        """Close the file and fail queued transfers."""
        self.file.close()
        self.ring.close()

    def _read(self, handle: SwapHandle, buffer_n: torch.Tensor) -> None:
        def read() -> None:
            written = handle.writing.result()  # the data must be on disk first
            self.file.read(buffer_n[: handle.num_bytes], handle.offset, written)

        handle.buffer_n, handle.reading = buffer_n, self.file.threads.submit(read)
        self._under_way.append(handle.reading)

    def _send(self, buffer_n: torch.Tensor, done: Any, job: Callable[[], Any]) -> Future[Any]:
        """Run a job in a thread after a copy of a ring buffer, then return the buffer."""

        def run() -> Any:
            try:
                if done is not None:
                    done.synchronize()
                return job()
            finally:
                self.ring.give(buffer_n)

        future = self.file.threads.submit(run)
        self._under_way.append(future)
        return future

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        """Take a ring buffer; wait for the oldest transfers until one is free."""
        self.ring.budget = max(self.ring.budget, RING * pages(num_bytes))
        while self._under_way and self._under_way[0].done():
            self._under_way.pop(0).result()
        while (buffer_n := self.ring.take(num_bytes)) is None:
            self._wait(self._under_way.pop(0))
        return buffer_n

    def _wait(self, transfer: Future[Any]) -> None:
        begin = time.perf_counter()
        try:
            self.file.threads.wait(transfer)
        finally:
            self.seconds_waited += time.perf_counter() - begin


class ActivationStore:
    """Activation store of one engine; without ``spill``, what does not fit in the pool is an error."""

    def __init__(self, pool: HostBufferPool, spill: Swapper | None = None, copies: Copies | None = None) -> None:
        self.pool, self.spill, self.copies = pool, spill, copies or Copies()
        self.counts = Counts()
        self._last: Callable[[], Group | None] = lambda: None
        self._leaving: list[Group] = []

    def group(self, stays: bool = False, prefetches: bool = True) -> "Group":
        """Start a group of a layer's tensors; it stays on the device, or is prefetched in the order of the backward."""
        # The second-last group leaves first. Between forward and backward only groups that stay are on the device.
        self.release_kept(keep=0 if stays else 1)
        group = Group(self, self._last if prefetches else lambda: None, stays)
        self._last = weakref.ref(group) if prefetches else self._last
        if not stays:
            self._leaving.append(group)
        return group

    def close(self) -> None:
        """Release all buffers and files; tensors still offloaded are lost with their graph."""
        self.release_kept()
        if self.spill is not None:
            self.spill.close()
        self.pool.close()

    def release_kept(self, keep: int = 0) -> None:
        """Free the device tensors of all offloaded groups but the last ``keep``."""
        while len(self._leaving) > keep:
            for each in self._leaving.pop(0).alive():
                each.has_left()


class Group:
    """Tensors of one call of a checkpointed layer."""

    def __init__(self, store: ActivationStore, before: "Callable[[], Group | None]", stays: bool) -> None:
        self._store, self._before, self._stays = store, before, stays
        self._tensors: list[weakref.ref[OffloadedTensor]] = []

    def put(self, tensor: torch.Tensor) -> "OffloadedTensor":
        """Offload a tensor and return what restores it on each call (``attention_cache.Put``)."""
        offloaded = OffloadedTensor(self, tensor, self._store)
        self._tensors.append(weakref.ref(offloaded))
        if not self._stays and tensor.numel():
            offloaded.leave()
        return offloaded

    def fetch_before(self) -> None:
        """Start copying the group before this one back, and read earlier groups from disk as buffers allow."""
        group, is_next = self._before(), True
        for _ in range(1 + _GROUPS_AHEAD):
            for each in group.alive() if group is not None else ():
                each.come_back() if is_next else each.fetch()
            group, is_next = group._before() if group is not None else None, False

    def alive(self) -> "Iterator[OffloadedTensor]":
        """Yield the tensors that can still be asked for."""
        return (each for ref in self._tensors if (each := ref()) is not None)


class OffloadedTensor:
    """One tensor of a group: on the device, in a host buffer or on disk."""

    def __init__(self, group: Group, tensor: torch.Tensor, store: ActivationStore) -> None:
        self._group, self._store, self._stays = group, store, True
        # On the device: not offloaded yet, or copied back and not requested yet.
        self._tensor: torch.Tensor | None = tensor
        self._shape, self._device, self._dtype = tensor.shape, tensor.device, tensor.dtype
        self._strides = (tensor if is_dense(tensor) else torch.empty(tensor.shape, device="meta")).stride()
        self._buffer_n: torch.Tensor | None = None
        self._handle: SwapHandle | None = None
        self._done: Any = None
        self._source_n: torch.Tensor | None = None
        self._version = 0

    def leave(self) -> None:
        """Start the copy to the host or disk."""
        tensor, store = self._tensor, self._store
        assert tensor is not None
        # A copy if it has gaps, which must live until it has left.
        source_n = self._source_n = _bytes(tensor)
        num_bytes = source_n.numel()
        self._stays, self._version = False, tensor._version
        with owner("host"):
            if isinstance(tensor, FakeTensor):  # a ledger of real sizes has tensors without data
                self._buffer_n = torch.empty_like(source_n, device="cpu")
            elif (buffer_n := store.pool.take(num_bytes)) is not None:
                self._buffer_n = buffer_n
                weakref.finalize(self, store.pool.give, buffer_n).atexit = False
                self._done = store.copies.out(source_n, buffer_n[:num_bytes])
            elif store.spill is not None:
                self._done, self._handle = store.spill.out(source_n)
                weakref.finalize(self, store.spill.drop, self._handle).atexit = False
                store.counts.bytes_to_disk += num_bytes
            else:
                raise OffloadError(
                    f"alst.activation_checkpoint_cpu_offload: {store.pool.in_use:,} bytes of activations are on the "
                    f"host, and this rank's budget of {store.pool.budget:,} has no room for {num_bytes:,} more. Let "
                    "the rest go to disk (nvme_path), use a shorter sequence, or raise host_budget."
                )
        store.counts.bytes_out += num_bytes

    def has_left(self) -> None:
        """Free the device tensor, after the computation waits for its copy."""
        if self._stays or self._tensor is None:
            return
        self._store.copies.wait(self._done)
        if self._tensor._version != self._version:
            raise OffloadError(
                "alst.activation_checkpoint_cpu_offload: a layer's input was changed in place after the layer began, "
                "while it was copied to the host. Change a clone of it, or leave the key out."
            )
        self._tensor = self._source_n = None

    def fetch(self) -> None:
        """Start reading back from disk."""
        if self._handle is not None and self._store.spill is not None and self._tensor is None:
            self._store.spill.fetch(self._handle)

    def come_back(self) -> None:
        """Start the copy back to the device."""
        if self._tensor is not None:
            return
        store = self._store
        tensor = torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)
        target_n = _bytes(tensor)
        if self._buffer_n is not None:
            self._done = store.copies.back(self._buffer_n[: target_n.numel()], target_n)
        else:
            assert store.spill is not None and self._handle is not None
            self._done = store.spill.back(self._handle, target_n)
        store.counts.bytes_back += target_n.numel()
        self._tensor = tensor

    def __call__(self) -> torch.Tensor:
        """Return the tensor on its device."""
        self._store.release_kept()
        self.come_back()
        tensor = self._tensor
        assert tensor is not None
        if not self._stays:
            self._store.copies.wait(self._done)
            self._tensor = None  # owned by the caller from here; the next call copies again
        self._group.fetch_before()
        return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as ``[n]`` uint8; a dense copy if it has gaps."""
    tensor = tensor.detach()
    return laid_flat(tensor if is_dense(tensor) else tensor.contiguous()).view(torch.uint8)

"""Store of offloaded activations: on the host, and on disk beyond the host's budget.

Tensors are grouped by call of a checkpointed layer. The backward requests the groups in reverse: the first request to a
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
from deepspeed_alst.offload.attention_cache import flat_view, is_dense
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import STAGING_BUFFERS, CopyStream, HostBufferPool, pages
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
        done = self._copies.to_host(source_n, buffer_n[: source_n.numel()])
        writing = self._submit(buffer_n, done, lambda: self.file.write(buffer_n, offset))
        return done, SwapHandle(offset, buffer_n.numel(), writing)

    def read_ahead(self, handle: SwapHandle) -> None:
        """Start reading a tensor from disk, if a staging buffer is free and leaves another one free."""
        fits = self.staging.in_use + 2 * handle.num_bytes <= self.staging.budget
        if handle.reading is None and fits and (buffer_n := self.staging.acquire(handle.num_bytes)) is not None:
            self._read(handle, buffer_n)

    def swap_in(self, handle: SwapHandle, target_n: torch.Tensor) -> Any:
        """Start the copy of a tensor to the device; return the event to wait for."""
        if handle.reading is None:
            self._read(handle, self._staging_buffer(handle.num_bytes))
        assert handle.reading is not None and handle.buffer_n is not None
        self._wait(handle.reading)
        buffer_n, handle.buffer_n, handle.reading = handle.buffer_n, None, None
        done = self._copies.to_device(buffer_n[: target_n.numel()], target_n)
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


class ActivationStore:
    """Activation store of one engine; without ``swapper``, exceeding the pool's budget is an error."""

    def __init__(self, pool: HostBufferPool, swapper: Swapper | None = None, copies: CopyStream | None = None) -> None:
        self.pool, self.swapper, self.copies = pool, swapper, copies or CopyStream()
        self.counts = Counts()
        self._last: Callable[[], ActivationGroup | None] = lambda: None
        self._copying_out: list[ActivationGroup] = []

    def group(self, stays: bool = False, prefetches: bool = True) -> "ActivationGroup":
        """Start a group of a layer's tensors; it stays on the device, or is prefetched in the order of the backward."""
        # One group's copy overlaps with the next layer. Groups that stay are alone between forward and backward.
        self.release_copied(but_last=0 if stays else 1)
        group = ActivationGroup(self, self._last if prefetches else lambda: None, stays)
        self._last = weakref.ref(group) if prefetches else self._last
        if not stays:
            self._copying_out.append(group)
        return group

    def close(self) -> None:
        """Release all buffers and files; tensors still offloaded are lost with their graph."""
        self.release_copied()
        if self.swapper is not None:
            self.swapper.close()
        self.pool.close()

    def release_copied(self, but_last: int = 0) -> None:
        """Free the device tensors of all offloaded groups but the last ``but_last``."""
        while len(self._copying_out) > but_last:
            for tensor in self._copying_out.pop(0).tensors():
                tensor.release()


class ActivationGroup:
    """Tensors of one call of a checkpointed layer; ``previous`` returns the group before it in the forward."""

    def __init__(self, store: ActivationStore, previous: "Callable[[], ActivationGroup | None]", stays: bool) -> None:
        self._store, self._previous, self._stays = store, previous, stays
        self._tensors: list[weakref.ref[OffloadedTensor]] = []

    def put(self, tensor: torch.Tensor) -> "OffloadedTensor":
        """Offload a tensor and return a function to restore it (``attention_cache.Put``)."""
        offloaded = OffloadedTensor(self, tensor, self._store)
        self._tensors.append(weakref.ref(offloaded))
        if not self._stays and tensor.numel():
            offloaded.offload(tensor)
        return offloaded

    def prefetch_previous(self) -> None:
        """Start copying the previous group back, and read earlier groups from disk as buffers allow."""
        group = self._previous()
        for distance in range(1 + _GROUPS_AHEAD):
            if group is None:
                return
            for tensor in group.tensors():
                tensor.read_ahead() if distance else tensor.prefetch()
            group = group._previous()

    def tensors(self) -> "Iterator[OffloadedTensor]":
        """Yield the tensors that can still be requested."""
        return (tensor for ref in self._tensors if (tensor := ref()) is not None)


class OffloadedTensor:
    """One tensor of a group: on the device, in a host buffer or on disk."""

    def __init__(self, group: ActivationGroup, tensor: torch.Tensor, store: ActivationStore) -> None:
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

    def offload(self, tensor: torch.Tensor) -> None:
        """Start the tensor's copy to the host or disk."""
        store = self._store
        # A dense copy if the tensor has gaps, which must live until it is copied.
        source_n = self._source_n = _bytes(tensor)
        num_bytes = source_n.numel()
        self._stays, self._version = False, tensor._version
        with owner("host"):
            if isinstance(tensor, FakeTensor):  # without data, in a ledger of real sizes
                self._buffer_n = torch.empty_like(source_n, device="cpu")
            elif (buffer_n := store.pool.acquire(num_bytes)) is not None:
                self._buffer_n = buffer_n
                weakref.finalize(self, store.pool.release, buffer_n).atexit = False
                self._done = store.copies.to_host(source_n, buffer_n[:num_bytes])
            elif store.swapper is not None:
                self._done, self._handle = store.swapper.swap_out(source_n)
                weakref.finalize(self, store.swapper.free, self._handle).atexit = False
                store.counts.bytes_to_disk += num_bytes
            else:
                raise OffloadError(
                    f"alst.activation_checkpoint_cpu_offload: {store.pool.in_use:,} bytes of activations are on the "
                    f"host, and {num_bytes:,} more exceed this rank's budget of {store.pool.budget:,}. Set nvme_path "
                    "to offload the rest to disk, use shorter sequences, or raise host_budget."
                )
        store.counts.bytes_out += num_bytes

    def release(self) -> None:
        """Free the device tensor, after the computation waits for its copy."""
        if self._stays or self._tensor is None:
            return
        self._store.copies.wait(self._done)
        if self._tensor._version != self._version:
            raise OffloadError(
                "alst.activation_checkpoint_cpu_offload: a layer's input was changed in place while it was copied to "
                "the host. Change a clone of it, or set the key to false."
            )
        self._tensor = self._source_n = None

    def read_ahead(self) -> None:
        """Start reading back from disk."""
        if self._handle is not None and self._store.swapper is not None and self._tensor is None:
            self._store.swapper.read_ahead(self._handle)

    def prefetch(self) -> None:
        """Start the copy back to the device."""
        if self._tensor is not None:
            return
        store = self._store
        tensor = torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)
        target_n = _bytes(tensor)
        if self._buffer_n is not None:
            self._done = store.copies.to_device(self._buffer_n[: target_n.numel()], target_n)
        else:
            assert store.swapper is not None and self._handle is not None
            self._done = store.swapper.swap_in(self._handle, target_n)
        store.counts.bytes_back += target_n.numel()
        self._tensor = tensor

    def __call__(self) -> torch.Tensor:
        """Return the tensor on its device."""
        self._store.release_copied()
        self.prefetch()
        tensor = self._tensor
        assert tensor is not None
        if not self._stays:
            self._store.copies.wait(self._done)
            self._tensor = None  # owned by the caller from here; the next call copies again
        self._group.prefetch_previous()
        return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as ``[n]`` uint8; a dense copy if it has gaps."""
    tensor = tensor.detach()
    return flat_view(tensor if is_dense(tensor) else tensor.contiguous()).view(torch.uint8)

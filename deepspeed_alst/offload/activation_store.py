"""Store of offloaded activations: on the host, and on disk beyond the host's budget.

Tensors are grouped by call of a checkpointed layer. The backward requests the groups in reverse: the first request to a
group prefetches the one before it. At most two groups are on the device at once in either direction.

With ``packs``, bf16 tensors are packed before their copy (kernels/bf16_codec.py) and unpacked after the copy back. A
tensor with more escapes than its packed size has room for is stored as it is. This is known when its header is on the
host, and no later than its values are needed: ``release``, which frees them, first waits on the host for the copy.
Until then the values are on the device, unchanged (``release`` checks), so that a copy of them is exact. The device
does not idle: ``group`` releases a group after the next one's layer has been queued, too.

Legend: n bytes of a tensor in memory order.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from deepspeed_alst.attention.attention_cache import flat_view, is_dense
from deepspeed_alst.errors import OffloadError
from deepspeed_alst.kernels import bf16_codec as codec
from deepspeed_alst.offload.host_buffers import CopyStream, HostBufferPool
from deepspeed_alst.offload.swapper import SwapHandle, Swapper
from deepspeed_alst.profiler.owners import owner

# Groups that are read from disk ahead of the copies to the device.
_GROUPS_AHEAD = 2


@dataclass
class Counts:
    """Bytes moved by a store, packed if they were."""

    bytes_out: int = 0
    bytes_back: int = 0
    bytes_to_disk: int = 0
    overflows: int = 0  # tensors that were packed and then stored unpacked


class ActivationStore:
    """Activation store of one engine; without ``swapper``, exceeding the pool's budget is an error."""

    def __init__(self, pool: HostBufferPool, swapper: Swapper | None = None, copies: CopyStream | None = None) -> None:
        self.pool, self.swapper, self.copies = pool, swapper, copies or CopyStream()
        self.counts, self.packs = Counts(), False
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

    def put(self, tensor: torch.Tensor, ahead: bool = True) -> "OffloadedTensor":
        """Offload a tensor and return a function to restore it (``attention_cache.Put``).

        Without ``ahead`` it is prefetched when the group's other tensors are requested, instead of a group earlier.
        """
        offloaded = OffloadedTensor(self, tensor, self._store, ahead)
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
                if distance:
                    tensor.read_ahead()
                elif tensor.ahead:
                    tensor.prefetch()
            group = group._previous()

    def tensors(self) -> "Iterator[OffloadedTensor]":
        """Yield the tensors that can still be requested."""
        return (tensor for ref in self._tensors if (tensor := ref()) is not None)


class OffloadedTensor:
    """One tensor of a group: on the device, in a host buffer or on disk."""

    def __init__(self, group: ActivationGroup, tensor: torch.Tensor, store: ActivationStore, ahead: bool) -> None:
        self._group, self._store, self._stays, self.ahead = group, store, True, ahead
        # On the device: not offloaded yet, or copied back, packed if it was, and not requested yet.
        self._tensor: torch.Tensor | None = tensor
        self._shape, self._device, self._dtype = tensor.shape, tensor.device, tensor.dtype
        self._strides = (tensor if is_dense(tensor) else torch.empty(tensor.shape, device="meta")).stride()
        self._buffer_n: torch.Tensor | None = None
        self._handle: SwapHandle | None = None
        self._free: Any = None
        self._done: Any = None
        self._unclaimed: Any = None
        self._source_n: torch.Tensor | None = None
        self._header_n: torch.Tensor | None = None  # on the host, of a packed tensor
        self._num_bytes, self._version = 0, tensor._version

    def offload(self, tensor: torch.Tensor, packs: bool = True) -> None:
        """Start the tensor's copy to the host or disk, packed if the store packs and it makes the tensor smaller."""
        store = self._store
        # A dense or packed copy, which must live until it is copied.
        source_n = self._source_n = _bytes(tensor)
        self._header_n = None
        packed_bytes = codec.packed_bytes(tensor.numel())
        if packs and store.packs and self._dtype == torch.bfloat16 and packed_bytes < source_n.numel():
            source_n = self._source_n = self._pack(source_n, packed_bytes)
        num_bytes = self._num_bytes = source_n.numel()
        self._stays = False
        with owner("host"):
            if isinstance(tensor, FakeTensor):  # without data, in a ledger of real sizes
                self._buffer_n = torch.empty_like(source_n, device="cpu")
            elif (buffer_n := store.pool.acquire(num_bytes)) is not None:
                self._buffer_n = buffer_n
                self._free = weakref.finalize(self, store.pool.release, buffer_n)
                self._done = store.copies.start(source_n, buffer_n[:num_bytes])
            elif store.swapper is not None:
                self._done, self._handle = store.swapper.swap_out(source_n)
                self._free = weakref.finalize(self, store.swapper.free, self._handle)
                store.counts.bytes_to_disk += num_bytes
            else:
                raise OffloadError(
                    f"alst.activation_checkpoint_cpu_offload: {store.pool.in_use:,} bytes of activations are on the "
                    f"host, and {num_bytes:,} more exceed this rank's budget of {store.pool.budget:,}. Set nvme_path "
                    "to offload the rest to disk, use shorter sequences, or raise host_budget."
                )
        if self._free is not None:
            self._free.atexit = False
        store.counts.bytes_out += num_bytes

    def _pack(self, raw_n: torch.Tensor, num_bytes: int) -> torch.Tensor:
        """Pack a tensor's bytes on its device, and start the copy of the header to the host."""
        packed_n = raw_n.new_empty(num_bytes)
        codec.pack_(raw_n.view(torch.bfloat16), packed_n)
        # A copy of its own: a staging buffer is another tensor's when its bytes are on disk.
        self._header_n = torch.zeros(codec.HEADER, dtype=torch.uint8, pin_memory=self._store.pool.page_locked)
        self._store.copies.start(packed_n[: codec.HEADER], self._header_n)
        return packed_n

    def _check_overflow(self, tensor: torch.Tensor) -> None:
        """Wait for the copy of a packed tensor; if it has overflowed, free its slot and copy the tensor unpacked."""
        if self._header_n is None:
            return
        if self._done is not None:
            self._done.synchronize()
        if not codec.has_overflowed(self._header_n, self._num_bytes):
            return
        warnings.warn(
            "alst.activation_checkpoint_cpu_offload.packing: a tensor of many magnitudes is stored unpacked; "
            "engine.alst_offload.counts.overflows counts them. If there are many, set the key to false.",
            stacklevel=2,
        )
        self._store.counts.overflows += 1
        self._free()
        self._buffer_n = self._handle = None
        self.offload(tensor, packs=False)

    def release(self) -> None:
        """Free the device tensor, after the computation waits for its copy."""
        if self._stays or self._tensor is None:
            return
        self._check_overflow(self._tensor)
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
        is_packed = self._header_n is not None
        tensor = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device) if is_packed else self._empty()
        target_n = _bytes(tensor)
        if self._buffer_n is not None:
            self._done = store.copies.start(self._buffer_n[: target_n.numel()], target_n)
        else:
            assert store.swapper is not None and self._handle is not None
            self._done = store.swapper.swap_in(self._handle, target_n)
        store.counts.bytes_back += target_n.numel()
        self._tensor = tensor
        # If a backward ends without asking for it, before its memory is another tensor's.
        self._unclaimed = weakref.finalize(self, store.copies.wait, self._done)
        self._unclaimed.atexit = False

    def _empty(self) -> torch.Tensor:
        return torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)

    def __call__(self) -> torch.Tensor:
        """Return the tensor on its device."""
        self._store.release_copied()
        self.prefetch()
        tensor = self._tensor
        assert tensor is not None
        if not self._stays:
            self._store.copies.wait(self._done)
            if self._unclaimed is not None:
                self._unclaimed.detach()
            self._tensor = None  # owned by the caller from here; the next call copies again
            if self._header_n is not None:
                packed_n, tensor = tensor, self._empty()
                codec.unpack_(packed_n, flat_view(tensor))
        for late in self._group.tensors() if self.ahead else ():
            if not late.ahead:
                late.prefetch()
        self._group.prefetch_previous()
        return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as ``[n]`` uint8; a dense copy if it has gaps."""
    tensor = tensor.detach()
    return flat_view(tensor if is_dense(tensor) else tensor.contiguous()).view(torch.uint8)

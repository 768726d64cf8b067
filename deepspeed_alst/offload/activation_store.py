"""Store of offloaded activations: on the host, and on disk if the host has no room.

Tensors are grouped by call of a checkpointed layer. The backward takes the groups in reverse: the first request to a
group prefetches the one before it. At most two groups are on the device at once in either direction.
Legend: n bytes of a tensor in memory order.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.attention_cache import is_dense, laid_flat
from deepspeed_alst.offload.host_buffers import HostBufferPool
from deepspeed_alst.offload.streams import Copies, DirectCopies, copies_of
from deepspeed_alst.offload.swapper import SwapHandle, Swapper
from deepspeed_alst.profiler.owners import owner

# Groups that are read from disk ahead of the copies to the device.
_GROUPS_AHEAD = 2


@dataclass
class Counts:
    """Bytes moved by a store."""

    bytes_out: int = 0
    bytes_back: int = 0
    bytes_to_disk: int = 0
    bytes_from_disk: int = 0


class ActivationStore:
    """Activation store of one engine.

    Args:
        pool: host memory.
        spill: disk tier for tensors that do not fit in the pool; None makes that an error.
    """

    def __init__(self, pool: HostBufferPool, spill: Swapper | None = None) -> None:
        self.pool = pool
        self.spill = spill
        self.counts = Counts()
        self._copies: dict[torch.device, Copies] = {}
        self._last: Callable[[], Group | None] = lambda: None
        self._leaving: list[Group] = []

    def group(self, stays: bool = False) -> "Group":
        """Start a group for a call of a checkpointed layer.

        Args:
            stays: True to keep its tensors on the device, as the backward needs them at once.
        """
        # The second-last group leaves first. Between forward and backward only groups that stay are on the device.
        self.release_kept(keep=0 if stays else 1)
        group = Group(self, self._last(), stays)
        self._last = weakref.ref(group)
        if not stays:
            self._leaving.append(group)
        return group

    def close(self) -> None:
        """Release all buffers and files; tensors still offloaded are lost with their graph."""
        self.release_kept()
        if self.spill is not None:
            self.spill.close()
        self.pool.close()

    def copies(self, device: torch.device) -> Copies:
        """Return the copies for a device."""
        if device not in self._copies:
            self._copies[device] = copies_of(device)
        return self._copies[device]

    def release_kept(self, keep: int = 0) -> None:
        """Free the device tensors of all offloaded groups but the last ``keep``."""
        while len(self._leaving) > keep:
            for each in self._leaving.pop(0).alive():
                each.has_left()


class Group:
    """Tensors of one call of a checkpointed layer."""

    def __init__(self, store: ActivationStore, before: "Group | None", stays: bool) -> None:
        self._store = store
        self._before: Callable[[], Group | None] = (lambda: None) if before is None else weakref.ref(before)
        self._stays = stays
        self._tensors: list[weakref.ref[OffloadedTensor]] = []

    def put(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Offload a tensor and return a function that restores it on each call (a ``frames.Put``).

        Raises:
            OffloadError: neither the host nor the disk has room for it.
        """
        offloaded = OffloadedTensor(self, tensor, self._store)
        self._tensors.append(weakref.ref(offloaded))
        if not self._stays and tensor.numel():
            offloaded.leave()
        return offloaded.get

    def fetch_before(self) -> None:
        """Start copying the group before this one back, and read earlier groups from disk as buffers allow."""
        before = self._before()
        for each in before.alive() if before is not None else ():
            each.come_back()
        for _ in range(_GROUPS_AHEAD):
            before = before._before() if before is not None else None
            for each in before.alive() if before is not None else ():
                each.come_to_host()

    def alive(self) -> "Iterator[OffloadedTensor]":
        """Yield the tensors that can still be asked for."""
        return (each for ref in self._tensors if (each := ref()) is not None)


class OffloadedTensor:
    """One tensor of a group: on the device, in a host buffer or on disk."""

    def __init__(self, group: Group, tensor: torch.Tensor, store: ActivationStore) -> None:
        self._group, self._store = group, store
        # On the device: not offloaded yet, or copied back and not requested yet.
        self._tensor: torch.Tensor | None = tensor
        self._shape, self._device, self._dtype = tensor.shape, tensor.device, tensor.dtype
        self._strides = (tensor if is_dense(tensor) else torch.empty(tensor.shape, device="meta")).stride()
        # A ledger of real sizes has tensors without data.
        self._copies = DirectCopies() if isinstance(tensor, FakeTensor) else store.copies(tensor.device)
        self._stays = True
        self._buffer_n: torch.Tensor | None = None
        self._handle: SwapHandle | None = None
        self._done: Any = None
        self._source_n: torch.Tensor | None = None
        self._version = 0

    def leave(self) -> None:
        """Start the copy to the host or disk."""
        tensor, store, copies = self._tensor, self._store, self._copies
        assert tensor is not None
        # A copy if it has gaps, which must live until it has left.
        source_n = self._source_n = _bytes(tensor)
        num_bytes = source_n.numel()
        self._stays, self._version = False, tensor._version
        with owner("host"):
            if isinstance(tensor, FakeTensor):
                self._buffer_n = torch.empty_like(source_n, device="cpu")
                copies.out(source_n, self._buffer_n)
            elif (buffer_n := store.pool.take(num_bytes)) is not None:
                self._buffer_n = buffer_n
                weakref.finalize(self, store.pool.give, buffer_n).atexit = False
                self._done = copies.out(source_n, buffer_n[:num_bytes])
            elif store.spill is not None:
                self._done, self._handle = store.spill.out(source_n, copies)
                weakref.finalize(self, store.spill.drop, self._handle).atexit = False
                store.counts.bytes_to_disk += num_bytes
            else:
                raise OffloadError(
                    f"alst.activation_checkpoint_cpu_offload: {store.pool.in_use:,} bytes of activations wait on the "
                    f"host, and this rank's budget of {store.pool.budget:,} has no room for {num_bytes:,} more. Let "
                    "the rest go to disk (nvme_path), use a shorter sequence, or raise host_budget."
                )
        store.counts.bytes_out += num_bytes

    def has_left(self) -> None:
        """Free the device tensor, after the computation waits for its copy.

        Raises:
            OffloadError: it was modified in place during the copy.
        """
        if self._stays or self._tensor is None:
            return
        self._copies.wait_on_device(self._done)
        if self._tensor._version != self._version:
            raise OffloadError(
                "alst.activation_checkpoint_cpu_offload: a layer's input was changed in place after the layer began, "
                "while it was copied to the host. Change a clone of it, or leave the key out."
            )
        self._tensor = self._source_n = None

    def come_to_host(self) -> None:
        """Start reading back from disk."""
        if self._handle is not None and self._tensor is None:
            assert self._store.spill is not None
            self._store.spill.fetch(self._handle)

    def come_back(self) -> None:
        """Start the copy back to the device."""
        if self._tensor is not None:
            return
        store = self._store
        tensor = torch.empty_strided(self._shape, self._strides, dtype=self._dtype, device=self._device)
        target_n = _bytes(tensor)
        if self._buffer_n is not None:
            self._done = self._copies.back(self._buffer_n[: target_n.numel()], target_n)
        else:
            assert store.spill is not None and self._handle is not None
            self._done = store.spill.back(self._handle, target_n, self._copies)
            store.counts.bytes_from_disk += target_n.numel()
        store.counts.bytes_back += target_n.numel()
        self._tensor = tensor

    def get(self) -> torch.Tensor:
        """Return the tensor on its device."""
        self._store.release_kept()
        self.come_back()
        tensor = self._tensor
        assert tensor is not None
        if not self._stays:
            self._copies.wait_on_device(self._done)
            self._tensor = None  # owned by the caller from here; the next call copies again
        self._group.fetch_before()
        return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as ``[n]`` uint8; a dense copy if it has gaps."""
    tensor = tensor.detach()
    return laid_flat(tensor if is_dense(tensor) else tensor.contiguous()).view(torch.uint8)

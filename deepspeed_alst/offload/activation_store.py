"""Store of offloaded activations: on the host, and on disk if the host has no room.

Tensors are grouped by call of a checkpointed layer. The backward takes the groups in reverse: the first request to a
group prefetches the one before it. At most two groups are on the device at once in either direction.

Legend: n bytes of a tensor in memory order.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.attention_cache import is_dense, laid_flat
from deepspeed_alst.offload.host_buffers import Buffer, HostBufferPool
from deepspeed_alst.offload.streams import Copies, DirectCopies, copies_of
from deepspeed_alst.offload.swapper import Swapper
from deepspeed_alst.profiler.owners import owner


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
        self._last: weakref.ref[Group] | None = None
        self._leaving: list[Group] = []

    def group(self, stays: bool = False) -> "Group":
        """Start a group for a call of a checkpointed layer.

        Args:
            stays: True to keep its tensors on the device, as the backward needs them at once.
        """
        before = self._last() if self._last is not None else None
        # The second-last group leaves first. Between forward and backward only groups that stay are on the device.
        self.release_kept(keep=0 if stays else 1)
        group = Group(self, before, stays)
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
            self._leaving.pop(0).has_left()


class Group:
    """Tensors of one call of a checkpointed layer."""

    def __init__(self, store: ActivationStore, before: "Group | None", stays: bool) -> None:
        self._store = store
        self._before = weakref.ref(before) if before is not None else None
        self._stays = stays
        self._waiting: list[weakref.ref[Waiting]] = []

    def put(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Offload a tensor and return a function that restores it on each call (a ``frames.Put``).

        Raises:
            OffloadError: neither the host nor the disk has room for it.
        """
        waiting = Waiting(self, tensor, self._store)
        self._waiting.append(weakref.ref(waiting))
        if not self._stays:
            waiting.leave()
        return waiting.get

    def fetch(self) -> None:
        """Start copying all tensors back to the device."""
        for each in self._alive():
            each.come_back()

    def fetch_from_disk(self) -> None:
        """Start reading the tensors on disk back to the host."""
        for each in self._alive():
            each.come_to_host()

    def fetch_before(self) -> None:
        """Prefetch the group before this one, and read earlier groups from disk as buffers allow."""
        before = self._before() if self._before is not None else None
        if before is None:
            return
        before.fetch()
        spill = self._store.spill
        for _ in range(spill.groups_ahead if spill is not None else 0):
            before = before._before() if before._before is not None else None
            if before is None:
                return
            before.fetch_from_disk()

    def has_left(self) -> None:
        """Free the device tensors, after the computation waits for their copies."""
        for each in self._alive():
            each.has_left()

    def _alive(self) -> "list[Waiting]":
        return [each for ref in self._waiting if (each := ref()) is not None]


@dataclass
class _Held:
    """Location of one tensor's bytes, released by its finalizer."""

    buffer: Buffer | None = None
    ticket: Any = None
    """Ticket of the bytes on disk."""


@dataclass(eq=False)
class Waiting:
    """One offloaded tensor."""

    group: Group
    _tensor: torch.Tensor | None
    """The tensor on the device: not offloaded yet, or copied back and not requested yet."""
    _store: ActivationStore
    _held: _Held = field(default_factory=_Held)
    _done: Any = None
    _leaving: torch.Tensor | None = None
    """Source of the copy to the host."""
    _version: int = 0

    def __post_init__(self) -> None:
        tensor = self._tensor
        assert tensor is not None
        self._shape, self._device, self._dtype = tensor.shape, tensor.device, tensor.dtype
        self._strides = tensor.stride() if is_dense(tensor) else None
        self._copies = DirectCopies() if _is_fake(tensor) else self._store.copies(tensor.device)
        self._stays = True

    def leave(self) -> None:
        """Start the copy to the host or disk."""
        tensor, store = self._tensor, self._store
        assert tensor is not None
        if tensor.numel() == 0:
            return
        source_n = self._leaving = _bytes(tensor)  # a copy if it has gaps, which must live as long
        self._stays, self._version = False, tensor._version
        copies = self._copies
        with owner("host"):
            buffer = None if _is_fake(tensor) else store.pool.take(source_n.numel())
            if _is_fake(tensor):
                self._held.buffer = Buffer(torch.empty_like(source_n, device="cpu"))
                copies.out(source_n, self._held.buffer.bytes_n)
            elif buffer is not None:
                self._held.buffer = buffer
                _at_death(self, store.pool.give, buffer)
                self._done = copies.out(source_n, buffer.bytes_n[: source_n.numel()])
            elif store.spill is not None:
                self._done, self._held.ticket = store.spill.out(source_n, copies)
                _at_death(self, store.spill.drop, self._held.ticket)
                store.counts.bytes_to_disk += source_n.numel()
            else:
                raise _no_room(store.pool, source_n.numel())
        store.counts.bytes_out += source_n.numel()

    def has_left(self) -> None:
        """Free the device tensor.

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
        self._tensor = self._leaving = None

    def come_to_host(self) -> None:
        """Start reading back from disk."""
        if self._held.ticket is not None and self._tensor is None:
            assert self._store.spill is not None
            self._store.spill.fetch(self._held.ticket)

    def come_back(self) -> None:
        """Start the copy back to the device."""
        if self._tensor is not None:
            return
        store, held = self._store, self._held
        tensor = _empty(self._shape, self._strides, self._dtype, self._device)
        target_n = _bytes(tensor)
        copies = self._copies
        if held.buffer is not None:
            self._done = copies.back(held.buffer.bytes_n[: target_n.numel()], target_n)
        else:
            assert store.spill is not None
            self._done = store.spill.back(held.ticket, target_n, copies)
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
        self.group.fetch_before()
        return tensor


def _at_death(waiting: Waiting, function: Callable[[Any], None], what: Any) -> None:
    weakref.finalize(waiting, function, what).atexit = False


def _no_room(pool: HostBufferPool, num_bytes: int) -> OffloadError:
    return OffloadError(
        f"alst.activation_checkpoint_cpu_offload: {pool.in_use:,} bytes of activations wait on the host, and this "
        f"rank's budget of {pool.budget:,} has no room for {num_bytes:,} more. Let the rest go to disk (nvme_path), "
        "use a shorter sequence, or raise host_budget."
    )


def _is_fake(tensor: torch.Tensor) -> bool:
    """Return True for a FakeTensor, as used by a ledger of real sizes: it needs no pool memory."""
    return isinstance(tensor, FakeTensor)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as ``[n]`` uint8; a dense copy if it has gaps."""
    tensor = tensor.detach()
    if not is_dense(tensor):
        tensor = tensor.contiguous()
    return laid_flat(tensor).view(torch.uint8)


def _empty(
    shape: torch.Size, strides: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if strides is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)

"""Pool of host buffers in page-rounded sizes, page-locked for CUDA and reused by size.

PyTorch's pinned allocator rounds each block up to a power of two, which costs up to twice the host memory (PyTorch
issue 95823). Here each buffer is its own memory mapping, registered with CUDA at its exact size.
"""

import mmap
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.profiler.owners import owner

PAGE = mmap.PAGESIZE


def pages(num_bytes: int) -> int:
    """Round bytes up to whole pages, at least one."""
    return max(1, -(-num_bytes // PAGE)) * PAGE


class Registry(Protocol):
    """Registration of host memory with a device, which can then access it directly."""

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock a memory range."""

    def unregister(self, address: int) -> None:
        """Release the range that starts at this address."""


class CudaRegistry:
    """Ranges page-locked by ``cudaHostRegister``, which CUDA copies without staging.

    Raises:
        OffloadError: CUDA refuses a range, most often because the limit of locked memory is too low.
    """

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock a memory range for all devices of this process."""
        portable = 1  # cudaHostRegisterPortable
        self._check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, portable), num_bytes)

    def unregister(self, address: int) -> None:
        """Release the range that starts at this address, after all copies are done."""
        torch.cuda.synchronize()
        self._check(torch.cuda.cudart().cudaHostUnregister(address), 0)

    @staticmethod
    def _check(answer: Any, num_bytes: int) -> None:
        if int(answer):
            raise OffloadError(
                f"alst.activation_checkpoint_cpu_offload: CUDA cannot page-lock {num_bytes} bytes of host memory "
                f"(error {int(answer)}). See `ulimit -l`, and what else locks memory on this host."
            )


@dataclass
class Buffer:
    """Page-aligned host buffer."""

    bytes_n: torch.Tensor
    """uint8, a whole number of pages."""

    @property
    def num_bytes(self) -> int:
        """Buffer size in bytes, whole pages."""
        return self.bytes_n.numel()


@dataclass
class HostBufferPool:
    """Pool of host buffers by size; idle ones are reused, or freed when the budget needs their room.

    Args:
        budget: maximum bytes of all buffers together.
        sizes: bytes to round small requests up to: the tensor sizes of the longest sequence so far, so that shorter
            sequences reuse its buffers instead of adding many sizes.
        registry: page-locks the buffers; None without a device.
    """

    budget: int = 2**63 - 1
    sizes: tuple[int, ...] = ()
    registry: Registry | None = None
    num_bytes: int = 0
    """Bytes of all buffers, in use or idle."""
    in_use: int = 0
    most_in_use: int = 0
    _idle: dict[int, list[Buffer]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _closed: bool = False

    def take(self, num_bytes: int) -> Buffer | None:
        """Take a buffer of at least ``num_bytes``; None if it does not fit in the budget.

        Raises:
            OffloadError: the host or CUDA has no room, although the budget has.
        """
        size = next((each for each in sorted(self.sizes) if each >= num_bytes), pages(num_bytes))
        # Reentrant, as finalizers return buffers at any point, in any thread.
        with self._lock:
            if self._idle[size]:
                buffer = self._idle[size].pop()
            else:
                self._make_room(size)
                if self.num_bytes + size > self.budget:
                    return None
                buffer = self._map(size)
                self.num_bytes += size
            self.in_use += size
            self.most_in_use = max(self.most_in_use, self.in_use)
            return buffer

    def give(self, buffer: Buffer) -> None:
        """Return a buffer to the pool; its contents may be overwritten from now on."""
        with self._lock:
            self.in_use -= buffer.num_bytes
            if self._closed:
                self._unmap(buffer)
            else:
                self._idle[buffer.num_bytes].append(buffer)

    def round_to(self, sizes: Iterable[int]) -> None:
        """Round requests up to these sizes from now on; free idle buffers of other sizes."""
        with self._lock:
            self.sizes = tuple(sorted({pages(each) for each in sizes}))
            for size in set(self._idle) - set(self.sizes):
                while self._idle[size]:
                    self._unmap(self._idle[size].pop())

    def close(self) -> None:
        """Free all idle buffers now, and the others on return."""
        with self._lock:
            self._closed = True
            for buffers in self._idle.values():
                while buffers:
                    self._unmap(buffers.pop())

    def _make_room(self, size: int) -> None:
        """Free idle buffers of other sizes if the budget needs their room."""
        for other in sorted(self._idle, reverse=True):
            while self._idle[other] and self.num_bytes + size > self.budget:
                self._unmap(self._idle[other].pop())

    def _map(self, size: int) -> Buffer:
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OffloadError(
                f"alst.activation_checkpoint_cpu_offload: the host has no {size} bytes more ({error}). Use a shorter "
                "sequence, or let the rest go to disk (nvme_path)."
            ) from error
        # Forked processes, such as DataLoader workers, must not copy these pages.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                memory.madvise(getattr(mmap, advice))
        with owner("host"):  # allocated by an operator, so that a ledger records it
            bytes_n = torch.empty(0, dtype=torch.uint8).set_(
                torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
            )
        if self.registry is not None:
            self.registry.register(bytes_n.data_ptr(), size)
        return Buffer(bytes_n)

    def _unmap(self, buffer: Buffer) -> None:
        """Unregister a buffer and drop its memory; the mapping is freed with its last reference."""
        if self.registry is not None:
            self.registry.unregister(buffer.bytes_n.data_ptr())
        self.num_bytes -= buffer.num_bytes
        buffer.bytes_n = buffer.bytes_n.new_empty(0)

"""Host memory for what waits there: buffers of exactly the bytes asked for, to the page, used again and again.

PyTorch's pinned allocator rounds each block up to a power of two, which costs up to twice the host memory (PyTorch
issue 95823). Here a buffer is a mapping of its own, which is registered with CUDA as it is.
"""

import ctypes
import mmap
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.ledger.owners import owner

PAGE = mmap.PAGESIZE


def pages(num_bytes: int) -> int:
    """Bytes of the pages that hold so many, at least one."""
    return max(1, -(-num_bytes // PAGE)) * PAGE


class Registry(Protocol):
    """Makes host memory known to a device, which then reads and writes it by itself."""

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock a range."""

    def unregister(self, address: int) -> None:
        """Let go of the range that begins here."""


class CudaRegistry:
    """Ranges that CUDA copies to and from without a detour: ``cudaHostRegister``.

    Raises:
        OffloadError: CUDA refuses a range; most often the limit of locked memory is too low.
    """

    def register(self, address: int, num_bytes: int) -> None:
        """Page-lock a range for all devices of this process."""
        portable = 1  # cudaHostRegisterPortable
        self._check(torch.cuda.cudart().cudaHostRegister(address, num_bytes, portable), num_bytes)

    def unregister(self, address: int) -> None:
        """Let go of the range that begins here, when nothing is copied to or from it any more."""
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
    """Page-aligned bytes on the host."""

    bytes_n: torch.Tensor
    """uint8, to the page."""

    @property
    def num_bytes(self) -> int:
        """Bytes of it, whole pages."""
        return self.bytes_n.numel()


@dataclass
class HostPool:
    """Buffers by size. What is given back is kept for the next of its size, and let go if the room is needed.

    Args:
        budget: bytes that all buffers may take together.
        sizes: bytes that buffers are rounded up to where one of these is enough: those of the longest sequence so far.
            Shorter ones use its buffers again, instead of many more of all sizes.
        registry: page-locks them; None where there is no device to know them.
        cpus: where their pages are to lie: those of the node that the device hangs on. Empty: wherever they come.
    """

    budget: int = 2**63 - 1
    sizes: tuple[int, ...] = ()
    registry: Registry | None = None
    cpus: Set[int] = frozenset()
    num_bytes: int = 0
    """Of all buffers, in use or idle."""
    in_use: int = 0
    most_in_use: int = 0
    _idle: dict[int, list[Buffer]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _closed: bool = False

    def take(self, num_bytes: int) -> Buffer | None:
        """A buffer of so many bytes or a little more; None if the budget has no room for it.

        Raises:
            OffloadError: the host, or CUDA, has no room for it although the budget has.
        """
        size = next((each for each in sorted(self.sizes) if each >= num_bytes), pages(num_bytes))
        # Finalizers give back, and run wherever an object happens to die.
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
        """Give a buffer back; what is in it may be overwritten from now on."""
        with self._lock:
            self.in_use -= buffer.num_bytes
            if self._closed:
                self._unmap(buffer)
            else:
                self._idle[buffer.num_bytes].append(buffer)

    def round_to(self, sizes: Iterable[int]) -> None:
        """Have buffers of these sizes from now on; idle ones of other sizes go."""
        with self._lock:
            self.sizes = tuple(sorted({pages(each) for each in sizes}))
            for size in set(self._idle) - set(self.sizes):
                while self._idle[size]:
                    self._unmap(self._idle[size].pop())

    def close(self) -> None:
        """Let go of all idle buffers, and of the others as they come back."""
        with self._lock:
            self._closed = True
            for buffers in self._idle.values():
                while buffers:
                    self._unmap(buffers.pop())

    def _make_room(self, size: int) -> None:
        """Let idle buffers of other sizes go where the budget has no room beside them."""
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
        # A process that is forked while these are full, as a DataLoader's workers are, is not to have them copied.
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            if hasattr(mmap, advice):
                memory.madvise(getattr(mmap, advice))
        with owner("host"):  # by an operator, so that a ledger sees it
            bytes_n = torch.empty(0, dtype=torch.uint8).set_(
                torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
            )
        if self.cpus:
            _on_cpus(self.cpus, lambda: ctypes.memset(bytes_n.data_ptr(), 0, size))
        if self.registry is not None:
            self.registry.register(bytes_n.data_ptr(), size)
        return Buffer(bytes_n)

    def _unmap(self, buffer: Buffer) -> None:
        """The mapping goes with the last reference to it."""
        if self.registry is not None:
            self.registry.unregister(buffer.bytes_n.data_ptr())
        self.num_bytes -= buffer.num_bytes
        buffer.bytes_n = buffer.bytes_n.new_empty(0)


def _on_cpus(cpus: Set[int], work: Callable[[], object]) -> None:
    """Do something in a thread that runs on these CPUs only: the kernel puts a page near who touches it first."""

    def run() -> None:
        os.sched_setaffinity(0, cpus)  # of this thread
        work()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

"""Pool of host buffers in page-rounded sizes, page-locked for CUDA and reused by size.

PyTorch's pinned allocator rounds each block up to a power of two, which costs up to twice the host memory (PyTorch
issue 95823). Here each buffer is its own memory mapping, registered with CUDA at its exact size.
"""

import mmap
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.profiler.owners import owner

PAGE = mmap.PAGESIZE


def pages(num_bytes: int) -> int:
    """Round bytes up to whole pages, at least one."""
    return max(1, -(-num_bytes // PAGE)) * PAGE


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


class HostBufferPool:
    """Pool of host buffers by size; idle ones are reused, or freed when the budget needs their room.

    Args:
        budget: maximum bytes of all buffers together.
        registry: page-locks the buffers; None without a device.

    Attributes:
        num_bytes: bytes of all buffers, in use or idle.
        in_use: bytes of the buffers in use.
    """

    def __init__(self, budget: int = 2**63 - 1, registry: CudaRegistry | None = None) -> None:
        self.budget = budget
        self.registry = registry
        self.num_bytes = 0
        self.in_use = 0
        self._sizes: list[int] = []
        self._idle: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._lock = threading.RLock()  # reentrant, as finalizers return buffers at any point, in any thread
        self._closed = False

    def take(self, num_bytes: int) -> torch.Tensor | None:
        """Take a page-aligned buffer of at least ``num_bytes``, uint8; None if it does not fit in the budget.

        Raises:
            OffloadError: the host or CUDA has no room, although the budget has.
        """
        size = next((each for each in self._sizes if each >= num_bytes), pages(num_bytes))
        with self._lock:
            if self._idle[size]:
                buffer_n = self._idle[size].pop()
            else:
                for other in sorted(self._idle, reverse=True):
                    while self._idle[other] and self.num_bytes + size > self.budget:
                        self._release(self._idle[other].pop())
                if self.num_bytes + size > self.budget:
                    return None
                buffer_n = self._map(size)
                self.num_bytes += size
            self.in_use += size
            return buffer_n

    def give(self, buffer_n: torch.Tensor) -> None:
        """Return a buffer to the pool; its contents may be overwritten from now on."""
        with self._lock:
            self.in_use -= buffer_n.numel()
            if self._closed:
                self._release(buffer_n)
            else:
                self._idle[buffer_n.numel()].append(buffer_n)

    def round_to(self, sizes: Iterable[int]) -> None:
        """Round requests up to these sizes from now on; free idle buffers of other sizes.

        They are the tensor sizes of the longest sequence so far: shorter ones reuse its buffers.
        """
        with self._lock:
            self._sizes = sorted({pages(each) for each in sizes})
            for size in set(self._idle) - set(self._sizes):
                while self._idle[size]:
                    self._release(self._idle[size].pop())

    def close(self) -> None:
        """Free all idle buffers now, and the others on return."""
        with self._lock:
            self._closed = True
            self.round_to(())

    def _map(self, size: int) -> torch.Tensor:
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OffloadError(
                f"alst.activation_checkpoint_cpu_offload: the host has no {size} bytes more ({error}). Use a shorter "
                "sequence, or let the rest go to disk (nvme_path)."
            ) from error
        # Forked processes, such as DataLoader workers, must not copy these pages.
        memory.madvise(mmap.MADV_DONTFORK)
        memory.madvise(mmap.MADV_HUGEPAGE)
        with owner("host"):  # allocated by an operator, so that a ledger records it
            buffer_n = torch.empty(0, dtype=torch.uint8).set_(
                torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
            )
        if self.registry is not None:
            self.registry.register(buffer_n.data_ptr(), size)
        return buffer_n

    def _release(self, buffer_n: torch.Tensor) -> None:
        """Unregister a buffer; its mapping is freed with its last reference."""
        if self.registry is not None:
            self.registry.unregister(buffer_n.data_ptr())
        self.num_bytes -= buffer_n.numel()

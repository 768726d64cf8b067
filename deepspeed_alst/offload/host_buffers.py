"""Host buffers of whole pages, page-locked for CUDA and reused by size, and the copies to and from them.

PyTorch's pinned allocator rounds each block up to a power of two, which costs up to twice the host memory (PyTorch
issue 95823). Here each buffer is its own memory mapping, registered with CUDA at its exact size.
Legend: n bytes of a tensor in memory order.
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
STAGING_BUFFERS = 4
"""Number of host buffers, of the largest tensor's size each, for transfers to and from disk."""


def pages(num_bytes: int) -> int:
    """Round bytes up to whole pages, at least one."""
    return max(1, -(-num_bytes // PAGE)) * PAGE


class HostBufferPool:
    """Pool of host buffers by size; idle ones are reused, or freed to stay within the budget.

    Args:
        budget: maximum bytes of all buffers together.
        page_locked: register the buffers with CUDA, which then copies without staging.

    Attributes:
        num_bytes: bytes of all buffers, in use or idle.
        in_use: bytes of the buffers in use.
    """

    def __init__(self, budget: int = 2**63 - 1, page_locked: bool = False) -> None:
        self.budget, self.page_locked = budget, page_locked
        self.num_bytes = self.in_use = 0
        self._sizes: list[int] = []
        self._idle: dict[int, list[torch.Tensor]] = defaultdict(list)
        self._lock = threading.RLock()  # reentrant, as finalizers release buffers at any point, in any thread
        self._closed = False

    def acquire(self, num_bytes: int) -> torch.Tensor | None:
        """Return a page-aligned uint8 buffer of at least ``num_bytes``; None if the budget does not allow it.

        Raises:
            OffloadError: the host or CUDA is out of memory within the budget.
        """
        size = next((each for each in self._sizes if each >= num_bytes), pages(num_bytes))
        with self._lock:
            if self._idle[size]:
                buffer_n = self._idle[size].pop()
            else:
                for other in sorted(self._idle, reverse=True):
                    while self._idle[other] and self.num_bytes + size > self.budget:
                        self._free(self._idle[other].pop())
                if self.num_bytes + size > self.budget:
                    return None
                buffer_n = self._map(size)
                self.num_bytes += size
            self.in_use += size
            return buffer_n

    def release(self, buffer_n: torch.Tensor) -> None:
        """Return a buffer to the pool; its contents may be overwritten from now on."""
        with self._lock:
            self.in_use -= buffer_n.numel()
            if self._closed:
                self._free(buffer_n)
            else:
                self._idle[buffer_n.numel()].append(buffer_n)

    def set_sizes(self, sizes: Iterable[int]) -> None:
        """Round requests up to these sizes from now on, so that shorter sequences reuse the longest one's buffers.

        Frees idle buffers of other sizes.
        """
        with self._lock:
            self._sizes = sorted({pages(each) for each in sizes})
            for size in set(self._idle) - set(self._sizes):
                while self._idle[size]:
                    self._free(self._idle[size].pop())

    def close(self) -> None:
        """Free all idle buffers now, and the others on release."""
        with self._lock:
            self._closed = True
            self.set_sizes(())

    def _map(self, size: int) -> torch.Tensor:
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise OffloadError(
                f"alst.activation_checkpoint_cpu_offload: the host cannot allocate {size:,} more bytes ({error}). Use "
                "shorter sequences, or set nvme_path to offload the rest to disk."
            ) from error
        # Forked processes, such as DataLoader workers, must not copy these pages.
        memory.madvise(mmap.MADV_DONTFORK)
        memory.madvise(mmap.MADV_HUGEPAGE)
        with owner("host"):  # allocated by an operator, so that a ledger records it
            buffer_n = torch.empty(0, dtype=torch.uint8).set_(
                torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
            )
        if self.page_locked:
            portable = 1  # cudaHostRegisterPortable: for all devices of this process
            _check(torch.cuda.cudart().cudaHostRegister(buffer_n.data_ptr(), size, portable), size)
        return buffer_n

    def _free(self, buffer_n: torch.Tensor) -> None:
        """Unregister a buffer; its mapping is freed with its last reference."""
        if self.page_locked:
            torch.cuda.synchronize()  # a copy may still use it
            _check(torch.cuda.cudart().cudaHostUnregister(buffer_n.data_ptr()), buffer_n.numel())
        self.num_bytes -= buffer_n.numel()


def _check(status: Any, num_bytes: int) -> None:
    if int(status):
        raise OffloadError(
            f"alst.activation_checkpoint_cpu_offload: CUDA cannot page-lock or unlock {num_bytes:,} bytes of host "
            f"memory (error {int(status)}). Check `ulimit -l` and other processes that lock memory on this host."
        )


class CopyStream:
    """Copies between device and host, on a separate stream if the device has streams.

    A copy starts after all work queued so far and returns an event, None if it is done. Memory that a copy reads or
    writes belongs to the computation's stream: before it is freed, the computation must wait for the copy. That frees
    it at once, where ``Tensor.record_stream`` would keep it until all copies queued by then are done.

    Args:
        module: the device's module, such as ``torch.cuda``; None copies at once, for the CPU as the device.
        device: of the stream.
    """

    def __init__(self, module: Any = None, device: torch.device | None = None) -> None:
        self._module = module
        self._stream = None if module is None else module.Stream(device=device)

    def start(self, source_n: torch.Tensor, target_n: torch.Tensor) -> Any:
        """Start a copy in either direction; return the event to wait for."""
        if self._stream is None:
            target_n.copy_(source_n)
            return None
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target_n.copy_(source_n, non_blocking=True)
            return self._stream.record_event()

    def wait(self, done: Any) -> None:
        """Make work that is queued on the device from now on wait for a copy, without blocking this process."""
        if done is not None:
            self._module.current_stream().wait_event(done)

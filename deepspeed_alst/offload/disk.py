"""Disk tier of activation offload: file space, and reads and writes in the background.

A file belongs to one process. Its transfers use DeepSpeed's async I/O op where available, else system calls in
threads. Reads check a fingerprint: DeepSpeed's op ignores result codes, and a failed write would give a wrong
gradient.
"""

import mmap
import os
import threading
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from deepspeed_alst.errors import AlstError, ConfigError, OffloadError, SetupError
from deepspeed_alst.kernels.builder import OpBuildError
from deepspeed_alst.offload.channels import PAGE_BYTES, Channel, SystemCalls
from deepspeed_alst.offload.free_list import Extents
from deepspeed_alst.offload.host_buffers import pages
from deepspeed_alst.offload.scratch import KEY, ScratchFile
from deepspeed_alst.offload.transfers import Transfer, Workers, within

# Bytes per call: large enough for any disk's full rate, small enough to report progress in between.
_PIECE_BYTES = 64 << 20
# Every 509th word: at least one per page, and not always the same channels, as 509 is prime. Reads 2 bytes of 1,000.
_FINGERPRINT_STRIDE = 509
_CLOSE_SECONDS = 10.0


class DiskFile:
    """Disk space for one rank's activations, freed whenever and however the process ends.

    An activation is written and read as a whole, at its allocated offset.

    Args:
        folder: an existing folder; it is not created.
        engine: ``"aio"`` is DeepSpeed's op, ``"threads"`` system calls in threads, ``"auto"`` the op if available.
        silence_seconds: a disk that makes no progress for this long is an error.
        num_threads: number of concurrent transfers; the others queue in FIFO order.

    Attributes:
        description: the engine and its I/O mode, for the report.
        warning: a problem with the folder; empty if there is none.
        bytes_written, bytes_read: bytes of transfers that succeeded.

    Raises:
        ConfigError: the folder is missing, or cannot be written to or read from.
        SetupError: ``engine="aio"``, and the op is not available.
        OffloadError: the disk does not answer.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        engine: Literal["auto", "aio", "threads"] = "auto",
        silence_seconds: float = 120.0,
        num_threads: int = 4,
    ) -> None:
        path = Path(folder).expanduser().absolute()
        self._label = f"{KEY}={str(path)!r}"
        self._scratch = within(silence_seconds, self._label, lambda: ScratchFile(path))
        channels, self.engine, reason = _open_channels(self._scratch, engine, num_threads)
        self.description = _describe(self._scratch, self.engine, reason)
        self.warning = self._scratch.warning
        self.bytes_written = 0
        self.bytes_read = 0
        self._workers = Workers(channels, silence_seconds)
        self._lock = threading.Lock()
        self._extents = Extents()
        self._sizes_bytes: dict[int, int] = {}  # bytes allocated at each offset
        self._fingerprints: dict[int, int] = {}  # fingerprint of the data written at each offset
        self._latest: dict[int, Transfer] = {}
        # Also at interpreter exit: a thread that is in C++ while the interpreter ends aborts the process.
        self._end = weakref.finalize(self, _end, self._workers, self._scratch, _CLOSE_SECONDS)

    @property
    def seconds_waited(self) -> float:
        """Total seconds spent in ``Transfer.wait``."""
        return self._workers.seconds_waited

    @property
    def reserved_bytes(self) -> int:
        """File size in bytes."""
        return self._scratch.size_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes free on the disk besides this file; 2**63 - 1 if its file system does not report them."""
        free = self._scratch.free_bytes()
        return 2**63 - 1 if free is None else free

    def reserve(self, num_bytes: int) -> None:
        """Grow the file to at least this size before training, with its space reserved on disk.

        Raises:
            ConfigError: the disk does not have enough free space.
            OffloadError: the disk does not answer.
        """
        with self._lock:
            self._grow(pages(num_bytes), ConfigError)

    def allocate(self, num_bytes: int) -> int:
        """Allocate space, rounded up to pages, and return its offset; grow the file if needed.

        Raises:
            OffloadError: the disk is full, or does not answer.
        """
        with self._lock:
            size_bytes = pages(num_bytes)
            if lacking := self._extents.missing(size_bytes):
                self._grow(self._scratch.size_bytes + lacking, OffloadError)
            offset = self._extents.take(size_bytes)
            self._sizes_bytes[offset] = size_bytes
            return offset

    def free(self, offset: int) -> None:
        """Free allocated space, after its transfers have ended.

        Raises:
            OffloadError: the disk does not answer; the space is not freed.
        """
        if transfer := self._latest.pop(offset, None):
            transfer.wait_ended()
        with self._lock:
            self._fingerprints.pop(offset, None)
            self._extents.free(offset, self._sizes_bytes.pop(offset))

    def new_buffer(self, num_bytes: int) -> torch.Tensor:
        """Allocate host memory that the engine can use directly: ``[num_bytes]``, rounded up to pages.

        For a ring of reused buffers on machines without CUDA: the op's memory is never freed. With CUDA, registered
        memory serves both copies and transfers.
        """
        size_bytes = pages(num_bytes)
        locked = None
        if self.engine == "aio":
            from deepspeed_alst.offload.aio import locked_buffer

            locked = locked_buffer(size_bytes)
        return torch.frombuffer(mmap.mmap(-1, size_bytes), dtype=torch.uint8) if locked is None else locked

    def write(self, buffer: torch.Tensor, offset: int) -> Transfer:
        """Start writing a buffer to its allocated space; it must not change until the transfer is done.

        Raises:
            OffloadError: the file is closed.
        """
        return self._start("writing", self._write, buffer, offset)

    def read(self, buffer: torch.Tensor, offset: int) -> Transfer:
        """Start reading the data last written at an offset, after any write there still in flight.

        Raises:
            OffloadError: the file is closed.
        """
        return self._start("reading", self._read, buffer, offset)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Free the disk space and fail open transfers; a thread blocked past ``seconds`` delays it to process exit."""
        if self._end.detach():
            _end(self._workers, self._scratch, seconds)

    def _start(
        self, doing: str, job: Callable[[Channel, torch.Tensor, int], None], buffer: torch.Tensor, offset: int
    ) -> Transfer:
        num_bytes = buffer.numel()
        assert buffer.dtype == torch.uint8 and buffer.dim() == 1 and buffer.is_contiguous() and not buffer.is_cuda
        assert buffer.data_ptr() % PAGE_BYTES == 0 and num_bytes % PAGE_BYTES == 0
        assert self._sizes_bytes.get(offset) == num_bytes, "a buffer of another size than what was allocated there"
        with self._lock:
            previous = self._latest.get(offset)

            def in_order(channel: Channel) -> None:
                if previous:  # it left the queue earlier, so it does not wait for this one
                    previous.settle()
                job(channel, buffer, offset)

            label = f"{self._label}: {doing} {num_bytes:,} bytes at {offset:,}"
            self._latest[offset] = transfer = self._workers.start(label, in_order)
        return transfer

    def _write(self, channel: Channel, buffer: torch.Tensor, offset: int) -> None:
        self._fingerprints.pop(offset, None)
        for begin in range(0, buffer.numel(), _PIECE_BYTES):
            channel.write(buffer[begin : begin + _PIECE_BYTES], offset + begin)
            self._workers.sign()
        with self._lock:
            self._fingerprints[offset] = fingerprint(buffer)
            self.bytes_written += buffer.numel()

    def _read(self, channel: Channel, buffer: torch.Tensor, offset: int) -> None:
        written = self._fingerprints.get(offset)
        if written is None:
            raise OffloadError(f"{self._label}: nothing was written at {offset:,}, or the write failed.")
        for begin in range(0, buffer.numel(), _PIECE_BYTES):
            channel.read(buffer[begin : begin + _PIECE_BYTES], offset + begin)
            self._workers.sign()
        if fingerprint(buffer) != written:
            # System calls report the error.
            SystemCalls(self._scratch.descriptor, not self._scratch.why_buffered).read(buffer, offset)
            if fingerprint(buffer) != written:
                raise OffloadError(
                    f"{self._label}: {buffer.numel():,} bytes at {offset:,} came back different from what was written. "
                    "A write has failed without a word, as on a full or a broken disk: see the kernel's log (dmesg)."
                )
        with self._lock:
            self.bytes_read += buffer.numel()

    def _grow(self, size_bytes: int, kind: type[AlstError]) -> None:
        within(self._workers.silence_seconds, self._label, lambda: self._scratch.grow(size_bytes, kind))
        self._extents.grow(self._scratch.size_bytes)


def fingerprint(buffer: torch.Tensor) -> int:
    """Compute a checksum over a sample of words from each page: ``[n] -> 32 bits``."""
    return zlib.crc32(buffer.view(torch.int64)[::_FINGERPRINT_STRIDE].numpy().tobytes())


def _end(workers: Workers, scratch: ScratchFile, seconds: float) -> None:
    """Stop the threads, and free the space unless the disk blocks one of them."""
    if workers.close(seconds):
        scratch.close()


def _open_channels(scratch: ScratchFile, engine: str, num_threads: int) -> tuple[list[Channel], str, str]:
    """Open one channel per thread; return them, the engine's name, and the reason not to use DeepSpeed's op."""
    reason = "as asked for"
    if engine != "threads":
        try:
            if scratch.why_buffered:
                raise OpBuildError(scratch.why_buffered, "name a folder on another file system")
            if not scratch.reserves:
                raise OpBuildError("the file system cannot set space aside", "name a folder on another file system")
            from deepspeed_alst.offload.aio import open_aio_channels

            direct: list[Channel] = [SystemCalls(scratch.descriptor, direct=True) for _ in range(num_threads)]
            return [*open_aio_channels(scratch.descriptor, direct)], "aio", ""
        except OpBuildError as error:
            if engine == "aio":
                scratch.close()
                raise SetupError(f"DeepSpeed's async I/O op cannot be used: {error}. {error.way_out}.") from error
            reason = f"{error}; {error.way_out}"
    channels: list[Channel] = [SystemCalls(scratch.descriptor, not scratch.why_buffered) for _ in range(num_threads)]
    return channels, "threads", reason


def _describe(scratch: ScratchFile, engine: str, reason: str) -> str:
    """Return the description for the report, as a sentence."""
    how = f"buffered: {scratch.why_buffered}" if scratch.why_buffered else "O_DIRECT"
    what = (
        "DeepSpeed's async I/O op (buffers that are not pinned: system calls)"
        if engine == "aio"
        else f"system calls in threads ({reason})"
    )
    kind = f", {scratch.file_system}" if scratch.file_system else ""
    room = "" if scratch.reserves else "; space cannot be set aside there, and may run out in training"
    return f"{scratch.folder}{kind}: {what}, {how}{room}"

"""DeepSpeed's async I/O op as a channel to an open file, built once, with its preconditions checked.

The op ends the process if it cannot lock memory, cannot set up its queue, or reads past the end of a file, so these are
checked here. It ignores the result of a write; the disk tier compares the data it reads back.
"""

import contextlib
import errno
import functools
import hashlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import deepspeed
import torch
from deepspeed.git_version_info import installed_ops
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch.utils import cpp_extension

from deepspeed_alst.kernels.builder import OpBuildError, environment, first_error, only_builder

# 1 MiB per request, 32 in flight per handle, submitted by one thread; several handles run in parallel.
_BLOCK_BYTES, _QUEUE_DEPTH, _SUBMITTERS = 1 << 20, 32, 1
_CAP_IPC_LOCK = 1 << 14


class FileChannel(Protocol):
    """Fallback for buffers that the op does not support: system calls on the same file."""

    def write(self, buffer: torch.Tensor, offset: int) -> None:
        """Write all bytes of the buffer to the file."""

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """Read all bytes of the buffer from the file."""


class AioChannel:
    """One handle of the op, for one thread.

    Args:
        module: the op.
        descriptor: of a file that may be unlinked; the op opens it by its /proc entry.
        otherwise: handles unpinned buffers. The op would copy them into memory that it locks for each transfer (0.6
            GB/s; system calls and pinned buffers reach 1.5), and end the process if locking fails.
    """

    def __init__(self, module: ModuleType, descriptor: int, otherwise: FileChannel) -> None:
        self._handle = module.aio_handle(
            block_size=_BLOCK_BYTES,
            queue_depth=_QUEUE_DEPTH,
            single_submit=False,
            overlap_events=True,
            intra_op_parallelism=_SUBMITTERS,
        )
        self._name = _name(descriptor)
        self._otherwise = otherwise

    def write(self, buffer: torch.Tensor, offset: int) -> None:
        """Write all bytes of the buffer to the file from this offset on.

        Raises:
            OSError: the op could not open the file; it gives no details.
        """
        if not self._handle.is_pinned(buffer):
            self._otherwise.write(buffer, offset)
        elif self._handle.pwrite(buffer, self._name, False, False, offset) != 1:
            raise OSError(errno.EIO, "DeepSpeed's async I/O op could not write")

    def read(self, buffer: torch.Tensor, offset: int) -> None:
        """Read all bytes of the buffer from the file from this offset on.

        Raises:
            OSError: the op could not open the file; it gives no details.
        """
        if not self._handle.is_pinned(buffer):
            self._otherwise.read(buffer, offset)
        elif self._handle.pread(buffer, self._name, False, False, offset) != 1:
            raise OSError(errno.EIO, "DeepSpeed's async I/O op could not read")


def open_aio_channels(descriptor: int, otherwise: Sequence[FileChannel]) -> list[AioChannel]:
    """Open a channel of the op for each of the given fallbacks.

    Raises:
        OpBuildError: the op cannot be built or loaded, cannot open the file, or the kernel has no queues left for it.
    """
    module = load_aio()
    try:
        os.close(os.open(_name(descriptor), os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        raise OpBuildError(f"it cannot open a file without a name: {error.strerror}", "mount /proc") from error
    before = _num_queues()
    channels = [AioChannel(module, descriptor, each) for each in otherwise]
    if _num_queues() - before < len(channels) * (1 + _SUBMITTERS):
        raise OpBuildError("the kernel has no queues left for it", "raise fs.aio-max-nr with sysctl")
    return channels


def locked_buffer(num_bytes: int) -> torch.Tensor | None:
    """Allocate memory that the op accepts as pinned, ``[num_bytes]``; None if the lock limit is too low.

    The memory is never freed, as a tensor of it may outlive any owner: use it for long-lived buffers only.
    """
    if not _may_lock(num_bytes):
        return None
    # The memory belongs to the op, not to this handle, which is freed at once.
    handle = load_aio().aio_handle(_BLOCK_BYTES, 1, False, True, 1)
    return handle.new_cpu_locked_tensor(num_bytes, torch.empty(0, dtype=torch.uint8))


@functools.cache
def load_aio() -> ModuleType:
    """Load DeepSpeed's async I/O op: prebuilt, else built earlier, else built now in a minute or more.

    DeepSpeed's builder waits forever on the lock of a killed build. This one builds in its own folder, under a lock
    that the kernel releases when the process dies.

    Raises:
        OpBuildError: it cannot be built or loaded here; its ``way_out`` names a fix.
    """
    builder = AsyncIOBuilder()
    folder = build_folder()
    try:
        if problem := why_not_aio():
            raise problem
        folder.mkdir(parents=True, exist_ok=True)
        with only_builder(folder / "builder"):
            return _load_under_lock(builder, folder)
    except OpBuildError:
        raise
    except Exception as error:  # DeepSpeed's and torch's builders raise many types
        raise OpBuildError(
            f"DeepSpeed's async I/O op does not build: {first_error(str(error))}",
            "see the whole output of: python -c "
            "'from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=True)'",
        ) from error


def is_aio_there() -> bool:
    """Return True if the op is available without a build: installed with DeepSpeed, or built before."""
    return bool(installed_ops.get(AsyncIOBuilder.NAME)) or (build_folder() / "built").exists()


def why_not_aio() -> OpBuildError | None:
    """Return an error that names the missing build dependency, or None."""
    if _has_libaio():
        return None
    return OpBuildError("libaio is missing here", "install libaio-dev (apt) or libaio-devel (dnf)")


@functools.cache
def _has_libaio() -> bool:
    """Check for libaio once per process: DeepSpeed's check leaks a file descriptor each time."""
    return AsyncIOBuilder().has_function("io_submit", ("aio",))


def _load_under_lock(builder: AsyncIOBuilder, folder: Path) -> ModuleType:
    """Load a complete build, or build in a new folder that ``built`` links to when complete."""
    built = folder / "built"
    if built.exists():
        workplace = built.resolve()
        for left in workplace.glob("*/lock"):  # only the holder of our lock works here
            left.unlink()
    else:
        for killed in folder.glob("build-*"):
            shutil.rmtree(killed, ignore_errors=True)
        workplace = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    with environment(TORCH_EXTENSIONS_DIR=str(workplace)):
        module = builder.load(verbose=False)
    if not built.exists():
        built.symlink_to(workplace.name)
    return module


def build_folder() -> Path:
    """Return the build folder for this processor; its link ``built`` leads to a complete build."""
    processor = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    parts = (deepspeed.__version__, torch.__version__, torch.version.cuda, processor, sys.version_info[:2])
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    return root / "alst_deepspeed_aio" / hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _name(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _num_queues() -> int:
    """Count this process's async I/O queues: the kernel maps each into its memory."""
    return Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").count("/[aio]")


def _may_lock(num_bytes: int) -> bool:
    """Return True if this process may lock that many more bytes."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return True
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    may_all = int(status["CapEff"], 16) & _CAP_IPC_LOCK
    return bool(may_all) or 1024 * int(status["VmLck"].split()[0]) + num_bytes <= limit

"""Unnamed file in a user's folder: invisible to others, and freed when its process ends.

The folder must exist; it is checked by a test write and read.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import shlex
import tempfile
from pathlib import Path

from deepspeed_alst.errors import AlstError, ConfigError
from deepspeed_alst.offload.channels import PAGE_BYTES, advice

KEY = "alst.activation_checkpoint_cpu_offload.nvme_path"
# Short-lived name, for file systems without unnamed files; a crash before the unlink leaves the file behind.
_PREFIX = ".deepspeed-alst-offload-"
_NO_SUCH_CALL = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_IN_MEMORY = ("tmpfs", "ramfs")


class ScratchFile:
    """File private to this process, open for reading and writing.

    Attributes:
        descriptor: the open file descriptor.
        size_bytes: file size.
        why_buffered: reason why it is not open with O_DIRECT; empty if it is.
        reserves: True if disk blocks are reserved as the file grows, so that no write finds the disk full.
        file_system: type of the file system, if known.

    Raises:
        ConfigError: the folder is missing or cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.size_bytes = 0
        try:
            self.descriptor = _open_nameless(folder)
        except OSError as error:
            raise refused(folder, _why_not(folder, error)) from error
        try:
            self.file_system = _file_system(os.fstat(self.descriptor).st_dev)
            self.why_buffered = self._use_direct()
            self.reserves = self._lengthen(PAGE_BYTES)
            os.ftruncate(self.descriptor, 0)
        except OSError as error:
            os.close(self.descriptor)
            raise refused(folder, f"a test write failed: {error.strerror or error}. {advice(error)}") from error

    @property
    def warning(self) -> str:
        """Warning about this folder; empty if there is none."""
        if self.file_system in _IN_MEMORY:
            return f"{self.folder} is in memory ({self.file_system}): what is offloaded there frees none"
        return ""

    def grow(self, size_bytes: int, kind: type[AlstError]) -> None:
        """Grow the file, with its blocks reserved on disk where the file system supports it.

        Raises:
            AlstError: of the given kind: the disk does not have enough free space. The file size is unchanged.
        """
        needed = size_bytes - self.size_bytes
        if needed <= 0:
            return
        free = self.free_bytes()
        # Checked first, so that a far too large file does not briefly fill a shared disk.
        if free is not None and free < needed:
            raise self._full(kind, needed, os.strerror(errno.ENOSPC), OSError(errno.ENOSPC, ""))
        try:
            self._lengthen(size_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, self.size_bytes)
            raise self._full(kind, needed, error.strerror, error) from error
        self.size_bytes = size_bytes

    def free_bytes(self) -> int | None:
        """Return the disk's free bytes for this user; None if its file system does not report them."""
        state = os.fstatvfs(self.descriptor)
        return state.f_bavail * state.f_frsize if state.f_blocks else None

    def close(self) -> None:
        """Close the file, which frees its space."""
        os.close(self.descriptor)

    def _full(self, kind: type[AlstError], needed_bytes: int, reason: str | None, error: OSError) -> AlstError:
        free = self.free_bytes()
        left = "an unknown number of" if free is None else f"{free:,}"
        return kind(
            f"{KEY}={str(self.folder)!r}: {reason}: activations need {needed_bytes:,} bytes more there, and {left} "
            f"bytes are free. {advice(error)}."
        )

    def _use_direct(self) -> str:
        """Enable O_DIRECT if a test write succeeds; else return the reason why not."""
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            self._try_page()
            return ""
        except OSError as error:
            if error.errno not in _NO_SUCH_CALL:
                raise
            fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags)
            self._try_page()
            return f"{self.file_system or 'its file system'} has no O_DIRECT ({error.strerror})"

    def _try_page(self) -> None:
        """Write a page and read it back."""
        page = mmap.mmap(-1, PAGE_BYTES)
        sent = os.urandom(PAGE_BYTES)
        page[:] = sent
        written = os.pwritev(self.descriptor, [page], 0)
        page[:] = bytes(PAGE_BYTES)
        read = os.preadv(self.descriptor, [page], 0)
        if (written, read, page[:]) != (PAGE_BYTES, PAGE_BYTES, sent):
            raise OSError(errno.EIO, "a page that was written came back different")

    def _lengthen(self, size_bytes: int) -> bool:
        """Reserve blocks up to this size, else only extend the file; return whether they were reserved.

        posix_fallocate is unsuitable: without file system support it writes to every block.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        begin, length = ctypes.c_int64(self.size_bytes), ctypes.c_int64(size_bytes - self.size_bytes)
        while libc.fallocate(self.descriptor, 0, begin, length) != 0:
            code = ctypes.get_errno()
            if code in _NO_SUCH_CALL:
                os.ftruncate(self.descriptor, size_bytes)
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code))
        return True


def refused(folder: Path, reason: str) -> ConfigError:
    """Return the ConfigError for an unusable folder."""
    return ConfigError(f"{KEY}={str(folder)!r}: {reason}.")


def _why_not(folder: Path, error: OSError) -> str:
    """Return the reason why no file can be opened in a folder, and the fix."""
    if isinstance(error, FileNotFoundError) and not folder.exists():
        # Not created: a misspelt path or unmounted disk would put the file on the system disk.
        return f"there is no such folder. Mount its disk, or make it: mkdir -p {shlex.quote(str(folder))}"
    return f"{error.strerror or error}. {advice(error)}"


def _open_nameless(folder: Path) -> int:
    """Open an unnamed file, whose space is freed when no process has it open."""
    for left in folder.glob(f"{_PREFIX}*"):  # a live owner is about to unlink it too
        with contextlib.suppress(OSError):
            left.unlink()
    with contextlib.suppress(OSError):  # some network file systems do not support it
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    return descriptor


def _file_system(device: int) -> str:
    """Return the type of a device's file system, as the kernel names it; empty if unknown."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split()
            if fields[2] == number:
                return fields[fields.index("-") + 1]
    return ""

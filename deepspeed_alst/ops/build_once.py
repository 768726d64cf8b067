"""Safe builds at first use: one builder at a time, a restored environment, errors with a fix."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

# A build takes 10 s on CPU and a minute for CUDA; a lock held for longer than this means a hang.
_WAIT_SECONDS = 300.0


class OpBuildError(RuntimeError):
    """Error of an op that cannot be built or loaded here, with a fix in ``way_out``."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(reason)
        self.way_out = way_out


@contextlib.contextmanager
def only_builder(path: Path) -> Iterator[bool]:
    """Hold a lock that the kernel releases when its holder dies for any reason.

    Yields True if the lock is held. On a file system without locks every process builds, each in its own folder.

    Raises:
        OpBuildError: another process has held the lock for too long.
    """
    with path.open("w") as file:
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise OpBuildError(
                        f"another process has been building it for {_WAIT_SECONDS:.0f} s",
                        f"end that process; fuser {path} names it",
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                held = False
                break
        yield held


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def first_error(output: str) -> str:
    """Return the line of a compiler's output to show: the first with "error", else the first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["the build failed without a word"]
    return next((line for line in lines[1:] if "error" in line.lower()), lines[0])

"""Safe builds at first use: one builder at a time, a restored environment, errors with a fix."""

import contextlib
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
def only_builder(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when its holder dies for any reason.

    Raises:
        OpBuildError: another process has held the lock for too long, or the file system has no locks.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = f"another process has been building it for {_WAIT_SECONDS:.0f} s"
                    raise OpBuildError(reason, f"end that process; fuser {path} names it") from None
                time.sleep(0.1)
            except OSError as error:
                reason = f"{path} cannot be locked: {error.strerror}"
                raise OpBuildError(reason, "name a folder in TORCH_EXTENSIONS_DIR") from error
        yield


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def first_error(output: str) -> str:
    """Return the line of a compiler's output to show: the first with "error", else the first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["the build failed without a word"]
    return next((line for line in lines[1:] if "error" in line.lower()), lines[0])

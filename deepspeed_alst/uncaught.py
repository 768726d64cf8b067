"""Uncaught errors of this package, printed once by the ranks that a launcher has started, and without our own frames.

The ranks share the name of an abstract Unix socket: who raises an error first binds its name and prints it, and a rank
that finds the name taken ends quietly. So nothing is kept back but what a living process of the same launcher prints to
the same terminal or file.
Standard library only, most of it imported when an error is printed.
"""

import os
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

_SWITCH = "DEEPSPEED_ALST_TRACEBACK"
_HEAD = f"Traceback (most recent call last; once for all ranks and shortened: {_SWITCH}=1 prints all of it):"
# Each rank lives on so long: the first until the slower ones have raised, the others until it has printed, since
# launchers end all ranks within about a second of the first one's end.
_WAIT_SECONDS = 2.0
_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def install() -> None:
    """Wrap ``sys.excepthook``; errors that are not this package's reach the hook that was there."""
    sys.excepthook = _around(sys.excepthook)


def _around(previous: _Hook) -> _Hook:
    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        errors = sys.modules.get("deepspeed_alst.errors")
        whole = os.environ.get(_SWITCH, "0") != "0" or os.environ.get("WORLD_SIZE", "1") == "1"
        if errors is None or whole or not isinstance(error, errors.AlstError):
            previous(kind, error, trace)
            return
        import atexit
        import time

        name = _claim(f"{kind.__qualname__}: {error}")
        atexit.register(lambda name: time.sleep(_WAIT_SECONDS), name)  # which holds the socket
        if name is None:
            return
        if isinstance(error.__cause__, errors.AlstError | None):
            # Not sys.stderr, which torch buffers to put this rank's number before each line.
            print(_shortened(error, trace), file=sys.__stderr__, flush=True)
        else:  # the program's or a library's error, which its frames explain
            previous(kind, error, trace)

    return excepthook


def _claim(sentence: str) -> Any:
    """Return a socket that holds the name of this sentence, or None if another rank of the launcher holds it."""
    import errno
    import hashlib
    import socket

    own = re.sub(r"(?<=: )rank \d+: ", "", sentence, count=1)  # added where the error is another rank's
    log = os.fstat(2)  # ranks with log files of their own print to each
    words = f"{os.getppid()} {os.environ.get('MASTER_PORT')} {log.st_dev} {log.st_ino} {own}"
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0deepspeed_alst {hashlib.sha256(words.encode()).hexdigest()}")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
    return name


def _shortened(error: Any, trace: TracebackType | None) -> str:
    """Return the program's last line on the way to the error, and the error as Python prints it."""
    import traceback

    libraries = os.path.dirname(__file__), os.path.dirname(traceback.__file__), "site-packages", "<string>"
    frames = [each for each in traceback.extract_tb(trace) if not any(part in each.filename for part in libraries)]
    kind, rank = type(error), "" if error.only_rank is None else f"rank {error.only_rank}: "
    lines = [_HEAD, *traceback.format_list(frames[-1:]), f"{kind.__module__}.{kind.__qualname__}: {rank}{error}"]
    return "\n".join(line.rstrip("\n") for line in [*lines, *getattr(error, "__notes__", ())])

"""Programs as processes of their own that need not import the libraries: forks, for a tenth of the seconds."""

import os
import runpy
import sys
import tempfile
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.ranks import fork_context


class Forked:
    """A program that runs as ``python PROGRAM WORDS``; its output goes to a file."""

    def __init__(self, program: Path, *words: str, environment: dict[str, str]) -> None:
        descriptor, log = tempfile.mkstemp(prefix="forked_")
        os.close(descriptor)
        self.log = Path(log)
        arguments = (str(program), list(words), environment, log)
        self.process: BaseProcess = fork_context().Process(target=_play, args=arguments)
        self.process.start()

    def finish(self, seconds: float) -> tuple[int, str]:
        """Return exit status and output, after at most so many seconds."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it runs on after {seconds:.0f} s:\n{self.log.read_text()[-3000:]}"
        return self.process.exitcode, self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.log.unlink()


def _play(program: str, words: list[str], environment: dict[str, str], log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.argv = [program, *words]
    status = 0
    try:
        runpy.run_path(program, run_name="__main__")
        threading._shutdown()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

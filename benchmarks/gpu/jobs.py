"""Processes that yield rows, each with its own device state, until the time is over. torch is not imported here."""

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.figures import Figure

LATE = "skipped: out of time"


@dataclass(frozen=True)
class Job:
    """Rows of one process."""

    name: str
    function: str
    """A generator of rows, as ``"module:name"``; its first argument is the scale."""
    device: str
    gib: float
    args: tuple[str, ...] = ()


def rows_of(job: Job, end: float) -> Iterator[Figure]:
    """Yield the rows of a job until a moment of ``time.monotonic``, and a missed one if it does not get to its end."""
    if time.monotonic() >= end:
        yield missed(job.name, "", LATE)
        return
    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(job, there))
    process.start()
    there.close()
    try:
        while here.poll(max(0.0, end - time.monotonic())):
            if (figure := here.recv()) is None:
                return
            yield figure
        yield missed(job.name, "", LATE)
    except EOFError:
        process.join()
        yield missed(job.name, f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _serve(job: Job, there: Connection) -> None:
    for figure in guarded(job.name, _rows, job):
        there.send(figure)
    there.send(None)


def _rows(job: Job) -> Iterator[Figure]:
    from benchmarks.gpu.scale import scale_of

    module, name = job.function.split(":")
    yield from getattr(importlib.import_module(module), name)(scale_of(job.device, job.gib), *job.args)


def guarded(name: str, rows: Callable[..., Iterator[Figure]], *args: Any) -> Iterator[Figure]:
    """Yield rows; an error ends them with a missed one that gives its reason."""
    try:
        yield from rows(*args)
    except Exception as error:  # the other parts go on
        yield missed(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}")


def missed(name: str, reason: str, verdict: str = "") -> Figure:
    """Return the row of a part that gave no figure."""
    return Figure(name, (reason,), "a figure", False, verdict)

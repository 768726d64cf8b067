"""Persistent rank processes on CPU: start P of them once, then run functions on all of them."""

import gc
import os
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any
from unittest import mock

import torch.multiprocessing as mp

from deepspeed_alst.cli.launch import free_port, remove_shared_memory

_ANSWER_SECONDS = 300.0

# Forks with the interpreter come from it.
_interpreter = forkserver.ForkServer()
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "DEEPSPEED_LOG_LEVEL": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


class RankError(RuntimeError):
    """Failure of a function on some ranks; ``errors`` holds each rank's exception or None."""

    def __init__(self, message: str, errors: list[BaseException | None]) -> None:
        super().__init__(message)
        self.errors = errors


class LateError(RankError):
    """Timeout of ranks without an exception; the cause may be the machine, not the function."""


def no_answer(seconds: float) -> str:
    """Return an error message for a timeout."""
    return (
        f"no answer within {seconds:.0f} s: the machine was too busy, or a build lock is in the way "
        "(~/.cache/torch_extensions/*/*/lock). Try again with nothing else running"
    )


def finished(command: list[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to completion, with its output as text.

    Raises:
        TimeoutError: it exceeded the time limit and was killed.
    """
    try:
        return subprocess.run(command, text=True, timeout=seconds, **options)
    except subprocess.TimeoutExpired:
        raise TimeoutError(no_answer(seconds)) from None


def fork_context() -> BaseContext:
    """Return a context whose processes are forks of one that has only imported preloaded.py."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preloaded"])
    # The first start imports the libraries, which read these variables.
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        forkserver.ensure_running()
    return context


@contextmanager
def interpreting() -> Iterator[None]:
    """Fork from another such process, with Triton's interpreter: its variable is read at Triton's first import."""
    names = ("set_forkserver_preload", "ensure_running", "connect_to_new_process")
    server = {name: getattr(_interpreter, name) for name in names}
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}), mock.patch.multiple(forkserver, **server):
        yield


class Ranks:
    """P processes with DeepSpeed and gloo initialized; close them, or use as a context manager."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        context = fork_context()
        self._port = port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks_")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, there, self._folder.name, dict(os.environ)), daemon=True
            )
            process.start()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = _ANSWER_SECONDS) -> list[Any]:
        """Run ``function(*args)`` on all ranks; return their results in rank order.

        Raises:
            RankError: it raised on some rank, or a rank timed out (LateError, if none raised). On a timeout all ranks
                are killed.
        """
        try:
            for connection in self._connections:
                connection.send((function, args))
            deadline = time.monotonic() + seconds
            answers = []
            for connection in self._connections:
                # The replies of other ranks explain why some hang.
                answered = connection.poll(max(0.0, deadline - time.monotonic()))
                answers.append(connection.recv() if answered else (None, None, no_answer(seconds)))
        except BaseException:
            # Interrupted between request and reply: the next request would receive this reply.
            self.close()
            raise
        errors = [error for _, error, _ in answers]
        traces = "\n".join(f"--- rank {rank}\n{trace}" for rank, (_, _, trace) in enumerate(answers) if trace)
        if traces:
            late = any(trace and error is None for _, error, trace in answers)
            if late:
                self.close()
            kind = LateError if late and not any(errors) else RankError
            raise kind(f"{function.__qualname__} failed:\n{traces}", errors)
        return [result for result, _, _ in answers]

    def close(self) -> None:
        """Kill the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._folder.cleanup()
        remove_shared_memory(self._port)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def interpreted_ranks(world_size: int) -> Ranks:
    """Start ranks that run Triton's interpreter."""
    with interpreting():
        ranks = Ranks(world_size)
        ranks.run(os.getpid)
    return ranks


def _serve(
    rank: int, world_size: int, port: int, connection: Connection, folder: str, environment: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # In the shared default cache, a killed build leaves an empty library, which later runs load.
        TORCHINDUCTOR_CACHE_DIR=os.path.join(folder, "inductor"),
        **_ENVIRONMENT,
    )
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # Library output goes to a file; results and errors go through the pipe.
    os.chdir(folder)
    log = os.open(f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    deepspeed.init_distributed("gloo")
    # DeepSpeed collects garbage several times per engine, over all imported objects, and a fork would copy their pages.
    gc.freeze()
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = (function(*args), None, None)
        except Exception as error:
            answer = (None, error, traceback.format_exc())
        try:
            connection.send(answer)
        except Exception:  # errors that cannot be pickled
            connection.send((None, RuntimeError(str(answer[1])), traceback.format_exc()))

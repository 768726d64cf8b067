"""Rank processes on CPU that stay up: start P of them once, then run functions on all of them."""

import gc
import os
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch.multiprocessing as mp

from deepspeed_alst.cli.launch import free_port, remove_shared_memory

_ANSWER_SECONDS = 300.0

# What ranks import before anything else, once for all of them. None of it starts a thread, which a fork would lose.
_IMPORTED = [
    "torch",
    "deepspeed",
    "torch._dynamo",
    "accelerate",
    "transformers.models.llama.modeling_llama",
]
_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "DEEPSPEED_LOG_LEVEL": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


class RankError(RuntimeError):
    """A function failed on some ranks; ``errors`` has each rank's exception, None where there was none."""

    def __init__(self, message: str, errors: list[BaseException | None]) -> None:
        super().__init__(message)
        self.errors = errors


class LateError(RankError):
    """Ranks did not answer in time, and none failed: this may say more of the machine than of what was asked."""


def no_answer(seconds: float) -> str:
    """What may be the matter where something has not ended in time."""
    return (
        f"no answer within {seconds:.0f} s: the machine was too busy, or a build lock is in the way "
        "(~/.cache/torch_extensions/*/*/lock). Try again with nothing else running"
    )


def finished(command: list[str], seconds: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command's end, with its output as text.

    Raises:
        TimeoutError: it has not ended in time, and was killed.
    """
    try:
        return subprocess.run(command, text=True, timeout=seconds, **options)
    except subprocess.TimeoutExpired:
        raise TimeoutError(no_answer(seconds)) from None


class Ranks:
    """P processes with DeepSpeed and gloo initialised. Close it, or use it in a ``with``.

    They are forks of a process that has imported the libraries and done nothing else; ``start_method="spawn"`` starts
    them from nothing, for an environment that is read at import.
    """

    def __init__(self, world_size: int, start_method: str = "forkserver") -> None:
        self.world_size = world_size
        context = mp.get_context(start_method)
        context.set_forkserver_preload(_IMPORTED)
        self._port = port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="ranks_")
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, there, self._folder.name, dict(os.environ)), daemon=True
            )
            # The first start imports the libraries, which read these then.
            with mock.patch.dict(os.environ, _ENVIRONMENT):
                process.start()
            self._connections.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, seconds: float = _ANSWER_SECONDS) -> list[Any]:
        """``function(*args)`` on every rank at once; their results in rank order.

        Raises:
            RankError: it raised on some rank, or a rank did not answer in time (LateError, if none raised). Then all
                ranks are killed.
        """
        try:
            return self._run(function, args, seconds)
        except RankError:
            raise
        except BaseException:
            # Interrupted between question and answer: the next question would get this one's answer.
            self.close()
            raise

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...], seconds: float) -> list[Any]:
        for connection in self._connections:
            connection.send((function, args))
        deadline = time.monotonic() + seconds
        answers = []
        for connection in self._connections:
            # Those that did answer say why the others hang.
            answered = connection.poll(max(0.0, deadline - time.monotonic()))
            answers.append(connection.recv() if answered else (None, None, no_answer(seconds)))
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
        """End the processes."""
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
    """Ranks in which Triton is interpreted: the variable is read at its first import."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        ranks = Ranks(world_size, start_method="spawn")
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
        # In the one that all programs share, a build that was killed leaves an empty library, which later runs load.
        TORCHINDUCTOR_CACHE_DIR=os.path.join(folder, "inductor"),
        **_ENVIRONMENT,
    )
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.utils.logger.setLevel("ERROR")
    # What libraries print goes to a file; results and errors go through the pipe.
    os.chdir(folder)
    log = os.open(f"rank{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    deepspeed.init_distributed("gloo")
    # DeepSpeed collects garbage several times an engine: through all that was imported, where a fork copies each page.
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
        except Exception:  # an error that cannot be pickled
            connection.send((None, RuntimeError(str(answer[1])), traceback.format_exc()))

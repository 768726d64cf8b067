"""Run programs with DeepSpeed's launcher and find the cause of a failure."""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from deepspeed_alst.errors import ConfigError, SetupError

_LOOK_SECONDS = 0.2
# Marker of lines that are also shown on the terminal.
PROGRESS = "ds_alst verify:"


def launch(words: list[str], world_size: int, log: Path) -> None:
    """Run a command with DeepSpeed's launcher; write its output to a log and its progress to the terminal.

    Raises:
        SetupError: it failed; the message has the cause.
    """
    environment = dict(os.environ)
    if not num_gpus():
        environment["DS_ACCELERATOR"] = "cpu"
        # Threads of several ranks would compete for cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    port = free_port()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size)]
    command = [*launcher, "--master_port", str(port), *words]
    with log.open("w") as out, log.open(errors="replace") as printed:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            is_over = False
            while not is_over:
                # Asked before the lines are read: those of the end are shown too.
                is_over = process.poll() is not None
                for line in printed:
                    if PROGRESS in line:
                        print(line[line.index(PROGRESS) :].rstrip(), file=sys.stderr, flush=True)
                time.sleep(0 if is_over else _LOOK_SECONDS)
        except BaseException:
            process.kill()
            raise
        finally:
            remove_shared_memory(port)
    if process.returncode:
        raise SetupError(f"{_reason(log)} (exit status {process.returncode}; all of it is in {log})")


def with_file(program: list[str], path: str) -> list[str]:
    """Replace a program's ds_config: ``--deepspeed JSON`` or ``--deepspeed_config JSON``, also with ``=``.

    Raises:
        ConfigError: the program has no such option.
    """
    for place, word in enumerate(program):
        key, equals, value = word.partition("=")
        # Without a value, --deepspeed is DeepSpeed's own switch beside --deepspeed_config JSON.
        following = value if equals else next(iter(program[place + 1 :]), "-")
        if key in ("--deepspeed", "--deepspeed_config") and not following.startswith("-"):
            found = [f"{key}={path}"] if equals else [key, path]
            return [*program[:place], *found, *program[place + len(found) :]]
    raise ConfigError("verify: the program's own words must have --deepspeed JSON, for another file to go there")


def _reason(log: Path) -> str:
    """Return the last exception in a run's log."""
    lines = [line.split("]: ", 1)[-1].rstrip() for line in log.read_text(errors="replace").splitlines()]
    own = [line for line in lines if line.startswith("deepspeed_alst.errors.")]
    found = own or [line for line in lines if "Error" in line.split(":")[0] and ": " in line]
    return found[-1] if found else "the run failed"


def num_gpus() -> int:
    """Return the number of GPUs of a run, or 0 if it would run on CPU."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def free_port() -> int:
    """Return an unused port below the kernel's ephemeral range, from which gloo's sockets take theirs.

    Rank 0 listens only seconds later, after its imports.

    Raises:
        SetupError: none of 100 tried ports is free.
    """
    for port in random.sample(range(15000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise SetupError("none of 100 ports between 15000 and 32000 is free")


def remove_shared_memory(port: int) -> None:
    """Remove buffers of DeepSpeed's CPU communication: 66 MiB per rank in /dev/shm for each port used."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)

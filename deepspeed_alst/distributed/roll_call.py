"""Detection of missing ranks after a failed collective: the backends do not name them.

Each remaining rank sends a message to every other rank, over a dedicated gloo group, as a group whose collective has
timed out is broken. This costs nothing until a collective fails.
"""

import contextlib
import re
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.errors import RankLostError

# Ranks start to wait, and give up, at about the same time.
_ANSWER_SECONDS = 10.0
# Parts of gloo's and torch's messages for a lost or silent peer, which has no exception class.
_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def world_timeout() -> timedelta:
    """Return the timeout of the world's collectives: the program's, or DeepSpeed's (``DEEPSPEED_TIMEOUT``).

    ``dist.new_group`` does not inherit it: its default is 30 minutes over gloo.
    """
    world = dist.distributed_c10d._get_default_group()
    options = getattr(world._get_backend(world._device_types[0]), "options", None)
    return getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)


@contextlib.contextmanager
def name_missing_ranks(group: Any, seconds: float = _ANSWER_SECONDS) -> Iterator[None]:
    """Convert a collective's failure inside the context to an error with the lost or silent rank's number.

    Args:
        group: all ranks over gloo, used for nothing else.
        seconds: time limit for a rank's answer.

    Raises:
        RankLostError: instead of the backend's error, which is its cause.
    """
    try:
        yield
    except RankLostError:
        raise
    except RuntimeError as error:
        if not is_collective_failure(error):
            raise
        raise RankLostError(_describe(error, find_missing_ranks(group, seconds), dist.get_world_size(group))) from error


def is_collective_failure(error: Exception) -> bool:
    """Return True for the error of a backend that has lost a rank, or waited too long for one."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
    )


def find_missing_ranks(group: Any, seconds: float) -> dict[int, str]:
    """Return the ranks that do not answer, each with its state; blocks for at most twice ``seconds``."""
    rank, found = dist.get_rank(group), dict[int, str]()

    def ask(peer: int) -> None:
        sign, answer = torch.zeros(1), torch.zeros(1)
        try:
            sent = dist.isend(sign, group=group, group_dst=peer)
            dist.irecv(answer, group=group, group_src=peer).wait(timedelta(seconds=seconds))
            sent.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            silent = "Timed out" in str(error)
            found[peer] = f"does not answer within {seconds:.0f} s" if silent else "has ended"

    threads = [threading.Thread(target=ask, args=(peer,)) for peer in range(dist.get_world_size(group)) if peer != rank]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(sorted(found.items()))


def _describe(error: RuntimeError, missing: dict[int, str], world_size: int) -> str:
    # Drop the backend's source location and its advice.
    reason = re.sub(r"^\[[^\]]*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
    if not missing:
        return f"a collective failed, though all {world_size} ranks answer: they do not call the same ones ({reason})"
    who = "; ".join(f"rank {rank} {what}" for rank, what in missing.items())
    return (
        f"{who} (of {world_size} ranks; a collective failed: {reason}). The reason is in that rank's own output; a "
        "process that was killed has left none: look for the kernel's out-of-memory killer there. How long ranks wait "
        f"for one another ({world_timeout().total_seconds():.0f} s) is DEEPSPEED_TIMEOUT, in whole minutes."
    )

"""Agreement between ranks over gloo, detection of missing ranks, and the count of bytes sent."""

import contextlib
import re
import socket
import threading
import weakref
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.errors import AlstError, ConfigError, RankLostError

# Parts of gloo's and torch's messages for a lost or silent peer, which has no exception class.
_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")


def gather_objects(mine: Any, group: Any) -> list[Any]:
    """Gather a picklable object from every rank, in group order. Collective over a gloo group."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def any_rank(mine: bool, group: Any) -> bool:
    """Return True if a condition holds on any rank. Collective over a gloo group."""
    found = torch.tensor([mine], dtype=torch.uint8)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return bool(found)


def ranks_on_host(group: Any) -> int:
    """Return the number of ranks in this host's (or container's) memory. Collective over a gloo group."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # hosts from one image may have one name
    host = socket.gethostname(), boot.read_text() if boot.exists() else ""
    return gather_objects(host, group).count(host)


def difference_over_ranks(mine: Mapping[str, Any], group: Any) -> str:
    """Describe how the first rank that differs from rank 0 does; empty if none. Collective over a gloo group."""
    first, *others = gather_objects(dict(mine), group)
    for rank, found in enumerate(others, start=1):
        # By repr too, as NaN, which JSON may contain, is not equal to itself.
        different = [key for key in first if first[key] != found.get(key) and repr(first[key]) != repr(found.get(key))]
        if different:
            return "; ".join(f"{key}={first[key]!r} on rank 0, {found.get(key)!r} on rank {rank}" for key in different)
    return ""


def assert_same_on_all_ranks(settings: Mapping[str, Any], group: Any) -> None:
    """Raise ConfigError on all ranks if settings that collectives depend on differ. Collective over a gloo group."""
    if difference := difference_over_ranks(settings, group):
        raise ConfigError(f"the ranks have different ds_configs, and must have the same: {difference}")


def raise_on_all_ranks(error: AlstError | None, group: Any) -> None:
    """Raise on all ranks if any rank has an error. Collective over a gloo group.

    A rank with its own error raises it; the others raise the first rank's class, with its number and message.
    """
    if not any_rank(error is not None, group):
        return
    everyone = gather_objects(None if error is None else (type(error), str(error)), group)
    if error is not None:
        raise error
    for rank, found in enumerate(everyone):
        if found is not None:
            raise found[0](f"rank {rank}: {found[1]}")


@contextlib.contextmanager
def agree(control_group: Any, kind: type[AlstError] | None = None, problem: str = "") -> Iterator[None]:
    """Raise an error of one rank on all ranks. Collective over a gloo group.

    With ``kind``, exceptions that are not this package's are raised as that, after ``problem``.
    """
    error = None
    try:
        yield
    except AlstError as raised:
        error = raised
    except Exception as raised:
        if kind is None:
            raise
        error = kind(f"{problem}: {raised!r}")
        error.__cause__ = raised
    raise_on_all_ranks(error, control_group)


# --- missing ranks, which the backends do not name


def world_timeout() -> timedelta:
    """Return the timeout of the world's collectives, the program's or DeepSpeed's, which new groups do not inherit."""
    world = dist.distributed_c10d._get_default_group()
    options = getattr(world._get_backend(world._device_types[0]), "options", None)
    return getattr(options, "_timeout", dist.distributed_c10d.default_pg_timeout)


@contextlib.contextmanager
def name_missing_ranks(group: Any, seconds: float = 10.0) -> Iterator[None]:
    """Raise RankLostError with the lost or silent ranks' numbers for a collective that fails in the context.

    Args:
        group: all ranks over gloo, used for nothing else: a group whose collective has timed out is broken.
        seconds: time limit for a rank's answer.
    """
    try:
        yield
    except RankLostError:
        raise
    except RuntimeError as error:
        if not is_collective_failure(error):
            raise
        raise RankLostError(_describe(error, _find_missing(group, seconds), dist.get_world_size(group))) from error


def is_collective_failure(error: Exception) -> bool:
    """Return True for the error of a backend that has lost a rank, or waited too long for one."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
    )


def _find_missing(group: Any, seconds: float) -> dict[int, str]:
    """Exchange a message with every other rank; return those without an answer, each with its state."""
    rank, found = dist.get_rank(group), dict[int, str]()

    def ask(peer: int) -> None:
        try:
            sent = dist.isend(torch.zeros(1), group=group, group_dst=peer)
            dist.irecv(torch.zeros(1), group=group, group_src=peer).wait(timedelta(seconds=seconds))
            sent.wait(timedelta(seconds=seconds))
        except RuntimeError as error:
            found[peer] = f"does not answer within {seconds:.0f} s" if "Timed out" in str(error) else "has ended"

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
        return f"a collective failed, though all {world_size} ranks answer: they may call different ones ({reason})"
    who = "; ".join(f"rank {rank} {what}" for rank, what in missing.items())
    return (
        f"{who} (of {world_size} ranks; a collective failed: {reason}). The reason is in that rank's own output; if "
        "there is none, look for the kernel's out-of-memory killer on its host. DEEPSPEED_TIMEOUT, in whole minutes, "
        f"sets how long ranks wait for one another (now {world_timeout().total_seconds():.0f} s)."
    )


# --- bytes that this rank sent in the all-to-alls of a group, dropped with the group

_SENT: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def count_sent(group: Any, num_bytes: int) -> None:
    """Add bytes sent from this rank to others of the group; None, the default group, is not counted."""
    if group is not None:
        _SENT[group] = _SENT.get(group, 0) + num_bytes


def sent_bytes(group: Any) -> int:
    """Return the bytes counted so far."""
    return _SENT.get(group, 0)


@contextlib.contextmanager
def uncounted(group: Any) -> Iterator[None]:
    """Exclude bytes sent over the group inside the context from the count."""
    before = sent_bytes(group)
    try:
        yield
    finally:
        if group is not None:
            _SENT[group] = before

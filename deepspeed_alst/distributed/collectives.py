"""Agreement between ranks: small objects over gloo, and errors that all ranks raise together."""

import contextlib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepspeed_alst.errors import AlstError, ConfigError


def gather_objects(mine: Any, group: Any) -> list[Any]:
    """Gather a picklable object from every rank, in group order. Collective over a gloo group."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def ranks_on_host(group: Any) -> int:
    """Return the number of ranks in this host's (or container's) memory. Collective over a gloo group."""
    boot = Path("/proc/sys/kernel/random/boot_id")  # hosts from one image may have one name
    host = socket.gethostname(), boot.read_text() if boot.exists() else ""
    return gather_objects(host, group).count(host)


def broadcast_object(mine: Any) -> Any:
    """Broadcast rank 0's picklable object to every rank. Collective over all ranks."""
    everyones = [mine]
    dist.broadcast_object_list(everyones, src=0)
    return everyones[0]


def assert_same_on_all_ranks(settings: Mapping[str, Any], group: Any) -> None:
    """Check that settings that collectives depend on are equal on all ranks. Collective over a gloo group.

    Raises:
        ConfigError: on all ranks, with the first rank that differs and its values.
    """
    first, *others = gather_objects(dict(settings), group)
    for rank, found in enumerate(others, start=1):
        lines = [
            f"{key}={first[key]!r} on rank 0, {found[key]!r} on rank {rank}"
            for key in first
            # NaN, which JSON may contain, is not equal to itself.
            if first[key] != found[key] and repr(first[key]) != repr(found[key])
        ]
        if lines:
            raise ConfigError("the ranks have different ds_configs, and must have one: " + "; ".join(lines))


def raise_on_all_ranks(error: AlstError | None, group: Any) -> None:
    """Raise on all ranks if any rank has an error. Collective over a gloo group.

    A rank with its own error raises it; the others raise the same class, with that rank's number and message.

    Raises:
        AlstError: of the class of the first rank's error.
    """
    everyone = gather_objects(None if error is None else (type(error), str(error)), group)
    if error is not None:
        raise error
    for rank, found in enumerate(everyone):
        if found is not None:
            kind, message = found
            raise kind(f"rank {rank}: {message}")


@contextlib.contextmanager
def agree(control_group: Any) -> Iterator[None]:
    """Raise an error of one rank on all ranks. Collective over a gloo group."""
    error = None
    try:
        yield
    except AlstError as raised:
        error = raised
    raise_on_all_ranks(error, control_group)

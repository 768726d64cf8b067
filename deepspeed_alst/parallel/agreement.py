"""What one rank knows and all must act on: small objects over gloo, and errors that all ranks raise together."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from deepspeed_alst.errors import AlstError, ConfigError


def gather_objects(mine: Any, group: Any) -> list[Any]:
    """Every rank's picklable object, in group order. Collective over a gloo group."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def of_rank_0(mine: Any) -> Any:
    """Rank 0's picklable object, on every rank. Collective over all ranks."""
    everyones = [mine]
    dist.broadcast_object_list(everyones, src=0)
    return everyones[0]


def check_alike(settings: Mapping[str, Any], group: Any) -> None:
    """Make sure that all ranks have the same settings, on which it depends what they exchange. Collective, over gloo.

    Raises:
        ConfigError: on all ranks alike, with the first rank that differs and how.
    """
    first, *others = gather_objects(dict(settings), group)
    for rank, found in enumerate(others, start=1):
        lines = [
            f"{key}={first[key]!r} on rank 0, {found[key]!r} on rank {rank}"
            for key in first
            # NaN, which JSON may have, is not equal to itself.
            if first[key] != found[key] and repr(first[key]) != repr(found[key])
        ]
        if lines:
            raise ConfigError("the ranks have different ds_configs, and must have one: " + "; ".join(lines))


def raise_together(error: AlstError | None, group: Any) -> None:
    """Raise on all ranks if any rank has an error. Collective over a gloo group.

    A rank with an error of its own raises that; the others raise one of the same class that says which rank and what.

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

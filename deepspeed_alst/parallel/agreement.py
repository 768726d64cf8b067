"""What one rank knows and all must act on: small objects over gloo, and errors that all ranks raise together."""

from typing import Any

import torch.distributed as dist

from deepspeed_alst.errors import AlstError


def gather_objects(mine: Any, group: Any) -> list[Any]:
    """Every rank's picklable object, in group order. Collective over a gloo group."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


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

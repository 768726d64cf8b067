"""Every collective of torch.distributed that a process launches, and the bytes that its rank sends and receives.

Bytes are those of the usual algorithms: a ring for all-reduce, all-gather and reduce-scatter; of an all-to-all what
goes to, or comes from, other ranks, uneven splits included. A rank's share for itself is not on the wire.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# deepspeed is imported in the ranks: a spawned rank imports this file before benchmarks.ranks sets the variables that
# DeepSpeed reads at import.


@dataclass(frozen=True)
class Collective:
    """One collective as one rank sees it."""

    phase: str
    name: str
    sent: int | None
    """Bytes to other ranks; None where there is no rule for this collective."""
    received: int | None

    @property
    def busiest(self) -> int:
        """The larger of what goes out and what comes in: links carry both at once.

        Raises:
            RuntimeError: there is no rule for this collective's bytes.
        """
        if self.sent is None or self.received is None:
            raise RuntimeError(f"{self.name} in phase {self.phase!r}: no rule for its bytes")
        return max(self.sent, self.received)


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _split_to_others(x: torch.Tensor, splits: list[int] | None, P: int, r: int) -> int:
    """Bytes of a buffer but for this rank's own part of it; splits are of the first dimension."""
    if not splits:
        return _size(x) // P * (P - 1)
    return _size(x) // max(1, x.shape[0]) * (sum(splits) - splits[r])


# Bytes that one rank sends and receives, of a call's arguments by name.
_RULES: dict[str, Callable[[dict[str, Any], int, int], tuple[int, int]]] = {
    "all_to_all_single": lambda a, P, r: (
        _split_to_others(a["input"], a.get("input_split_sizes"), P, r),
        _split_to_others(a["output"], a.get("output_split_sizes"), P, r),
    ),
    "all_gather": lambda a, P, r: (_size(a["tensor"]) * (P - 1),) * 2,
    "all_gather_into_tensor": lambda a, P, r: (_size(a["input_tensor"]) * (P - 1),) * 2,
    "all_reduce": lambda a, P, r: (2 * _size(a["tensor"]) * (P - 1) // P,) * 2,
    "reduce_scatter_tensor": lambda a, P, r: (_size(a["input"]) * (P - 1) // P,) * 2,
}
_COLLECTIVES = (
    *("all_to_all", "all_to_all_single", "all_reduce", "all_reduce_coalesced", "reduce", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_coalesced", "_all_gather_base"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base"),
    *("gather", "scatter", "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "monitored_barrier"),
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
)
# DeepSpeed's backend took these from torch.distributed when it was made.
_KEPT_BY_DEEPSPEED = {
    "all_gather_function": "all_gather_into_tensor",
    "reduce_scatter_function": "reduce_scatter_tensor",
}


class Tally:
    """Writes down the collectives that this process launches inside a phase, in order."""

    def __init__(self) -> None:
        self.launched: list[Collective] = []
        self._phase: str | None = None
        self._inside = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count under this name; a phase inside a phase takes over until it ends."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def of(self, phase: str) -> list[Collective]:
        """A phase's collectives."""
        return [each for each in self.launched if each.phase == phase]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Stand in front of every collective, for torch.distributed's users and for its own functions."""
        import deepspeed

        with ExitStack() as undo:
            for name in _COLLECTIVES:
                counting = self._counting(name, getattr(distributed_c10d, name))
                for owner in (owner for owner in (dist, distributed_c10d) if hasattr(owner, name)):
                    undo.enter_context(mock.patch.object(owner, name, counting))
            for attribute, name in _KEPT_BY_DEEPSPEED.items():
                counting = getattr(distributed_c10d, name)
                undo.enter_context(mock.patch.object(deepspeed.comm.comm.cdb, attribute, counting))
            yield

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def collective(*args: Any, **kwargs: Any) -> Any:
            # all_gather_object and its kind are made of other collectives: what the caller asked for counts once.
            if self._phase is None or self._inside:
                return original(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            sent, received = None, None
            if name in _RULES:
                group = arguments.get("group")
                sent, received = _RULES[name](arguments, dist.get_world_size(group), dist.get_rank(group))
            self.launched.append(Collective(self._phase, name, sent, received))
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return collective

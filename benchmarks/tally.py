"""Record of all torch.distributed collectives that a process launches, with bytes sent and received.

Bytes assume the usual algorithms: a ring for all-reduce, all-gather and reduce-scatter; for an all-to-all the data to
and from other ranks, uneven splits included. A rank's own share is not counted. Given the ranks of a host, bytes to
other hosts are counted too: a ring's by the rank whose next one is there.
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

# The ranks import deepspeed: a spawned rank imports this file before benchmarks.ranks sets the variables that DeepSpeed
# reads at import.


@dataclass(frozen=True)
class Collective:
    """One collective on one rank."""

    phase: str
    name: str
    sent: int | None
    """Bytes to other ranks; None for collectives without a rule."""
    received: int | None
    to_other_hosts: int | None = None
    """Of the bytes sent, with the ranks of a host given."""

    @property
    def busiest(self) -> int:
        """The larger of bytes sent and received, since links are full duplex.

        Raises:
            RuntimeError: the collective has no rule for its bytes.
        """
        if self.sent is None or self.received is None:
            raise RuntimeError(f"{self.name} in phase {self.phase!r}: no rule for its bytes")
        return max(self.sent, self.received)


def _size(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _split_to_others(x: torch.Tensor, splits: list[int] | None, P: int, r: int) -> int:
    """Return bytes of a buffer without this rank's own part; splits are along the first dim."""
    if not splits:
        return _size(x) // P * (P - 1)
    return _size(x) // max(1, x.shape[0]) * (sum(splits) - splits[r])


def _share_of_other_hosts(name: str, arguments: dict[str, Any], ranks: list[int], r: int, host_size: int) -> float:
    """Return the part of the bytes sent by rank r of a group that goes to other hosts."""
    hosts = [rank // host_size for rank in ranks]
    if name != "all_to_all_single":
        return hosts[(r + 1) % len(hosts)] != hosts[r]
    splits = arguments.get("input_split_sizes") or [1] * len(hosts)
    others = sum(size for size, host in zip(splits, hosts, strict=True) if host != hosts[r])
    return others / max(1, sum(splits) - splits[r])


# Bytes that one rank sends and receives, from a call's arguments by name.
_RULES: dict[str, Callable[[dict[str, Any], int, int], tuple[int, int]]] = {
    "all_to_all_single": lambda a, P, r: (
        _split_to_others(a["input"], a.get("input_split_sizes"), P, r),
        _split_to_others(a["output"], a.get("output_split_sizes"), P, r),
    ),
    "all_gather": lambda a, P, r: (_size(a["tensor"]) * (P - 1),) * 2,
    "all_gather_single": lambda a, P, r: (_size(a["input_tensor"]) * (P - 1),) * 2,
    "all_reduce": lambda a, P, r: (2 * _size(a["tensor"]) * (P - 1) // P,) * 2,
    "reduce_scatter_single": lambda a, P, r: (_size(a["input"]) * (P - 1) // P,) * 2,
}
# Their older names, which DeepSpeed uses.
_RULES |= {
    "all_gather_into_tensor": _RULES["all_gather_single"],
    "reduce_scatter_tensor": _RULES["reduce_scatter_single"],
}
_COLLECTIVES = (
    *("all_to_all", "all_to_all_single", "all_reduce", "all_reduce_coalesced", "reduce", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_single", "all_gather_coalesced", "_all_gather_base"),
    *("reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single", "_reduce_scatter_base"),
    *("gather", "scatter", "send", "recv", "isend", "irecv", "batch_isend_irecv", "barrier", "monitored_barrier"),
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
)
# DeepSpeed's backend binds these functions of torch.distributed at construction.
_KEPT_BY_DEEPSPEED = {
    "all_gather_function": "all_gather_into_tensor",
    "reduce_scatter_function": "reduce_scatter_tensor",
}


class Tally:
    """Recorder of the collectives launched inside a phase, in order."""

    def __init__(self, host_size: int = 0) -> None:
        self._host_size = host_size
        self.launched: list[Collective] = []
        self._phase: str | None = None
        self._inside = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record under this name; an inner phase overrides an outer one."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def of(self, phase: str) -> list[Collective]:
        """Return a phase's collectives."""
        return [each for each in self.launched if each.phase == phase]

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap every collective, for users of torch.distributed and its own functions."""
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
            # all_gather_object and others call further collectives; only the outer call counts.
            if self._phase is None or self._inside:
                return original(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            sent, received, to_others = None, None, None
            if name in _RULES:
                group = arguments.get("group")
                r, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
                sent, received = _RULES[name](arguments, len(ranks), r)
                if self._host_size:
                    to_others = round(sent * _share_of_other_hosts(name, arguments, ranks, r, self._host_size))
            self.launched.append(Collective(self._phase, name, sent, received, to_others))
            self._inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._inside = False

        return collective

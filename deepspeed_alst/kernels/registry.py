"""Which functions compute an op: its definition in plain torch on any device, and its Triton kernels where they run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Op:
    """One op in its forms; all take the same arguments."""

    reference: Callable[..., Any]
    """Plain torch: of fp64 the truth, in another dtype the yardstick."""
    triton: Callable[..., Any]
    """The custom op that fake tensors, torch.compile and the ledger see."""
    launch: Callable[..., Any]
    """What the custom op does: compiled for any target on meta tensors, where a custom op would take its fake."""


_OPS: dict[str, Op] = {}


def register(name: str, *, reference: Callable[..., Any], triton: Callable[..., Any], launch: Callable[..., Any]) -> Op:
    """Make an op known: ``pick`` and the tests find it here."""
    _OPS[name] = Op(reference, triton, launch)
    return _OPS[name]


def registered() -> dict[str, Op]:
    """All ops by name."""
    return dict(_OPS)


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or triton.knobs.runtime.interpret


def pick(name: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes an op on a device."""
    op = _OPS[name]
    return op.triton if runs_on(device) else op.reference

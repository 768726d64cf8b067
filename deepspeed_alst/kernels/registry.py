"""Which functions compute an op: its definition in plain torch on any device, or its kernels where they run.

A kernel is tried on a small example before its first use on a device: one that is not as good as torch there is left
alone, with a warning.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils._pytree import tree_leaves, tree_map

from deepspeed_alst.apart import apart
from deepspeed_alst.ops.load import is_compiled, load

# Of the error that torch itself makes in the same dtype.
_SLACK = 3.0


@dataclass(frozen=True)
class Op:
    """One op in its forms; all take the same arguments."""

    reference: Callable[..., Any]
    """Plain torch: of fp64 the truth, in another dtype the yardstick."""
    op: Callable[..., Any]
    """The custom op that fake tensors, torch.compile and the ledger see; it launches the Triton kernels."""
    launch: Callable[..., Any]
    """What the custom op does: compiled for any target on meta tensors, where a custom op would take its fake."""
    example: Callable[[torch.device], tuple[Any, ...]]
    """Small fp32 arguments on a device, on which the op is tried there."""
    compiled: tuple[str, ...]
    """The ops of csrc that take its place on CPU; the custom op dispatches to them."""


_OPS: dict[str, Op] = {}


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    op: Callable[..., Any],
    launch: Callable[..., Any],
    example: Callable[[torch.device], tuple[Any, ...]],
    compiled: tuple[str, ...],
) -> Op:
    """Make an op known: ``pick`` and the tests find it here."""
    _OPS[name] = Op(reference, op, launch, example, compiled)
    return _OPS[name]


def registered() -> dict[str, Op]:
    """All ops by name."""
    return dict(_OPS)


def runs_on(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on a GPU, or anywhere under Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or triton.knobs.runtime.interpret


def load_tile_ops(device_type: str) -> None:
    """Put what is compiled from csrc in place, where a device has any; not beside Triton's interpreter."""
    if not triton.knobs.runtime.interpret:
        load("tile_ops", device_type, "what tiles are made of")


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether something faster than plain torch computes an op on a device: Triton's kernel, or on CPU one of csrc.

    The first question compiles and tries it, which takes seconds.
    """
    if triton.knobs.runtime.interpret:
        return True  # asked for, and a trial would take longer than its use
    if device.type == "cuda" and not torch.cuda.is_available():
        return True  # of tensors without data, whose machine is elsewhere
    if device.type == "cpu":
        load("tile_ops", "cpu", "what tiles are made of")
        if not all(is_compiled(each, "cpu") for each in _OPS[name].compiled):
            return False
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device.type in ("cpu", "cuda") and _is_proven(name, device.type, device.index)


def pick(name: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes an op on a device."""
    op = _OPS[name]
    return op.op if has_kernel(name, device) else op.reference


@functools.cache
def _is_proven(name: str, device_type: str, index: int | None) -> bool:
    """Whether an op's kernel agrees with its definition on a device; a warning says if not."""
    try:
        wrong = apart(_worst, _OPS[name], torch.device(device_type, index))
    except Exception as error:  # a compiler or a driver can fail in any way, and training need not
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"deepspeed_alst: the kernel of {name} is not used on {device_type}, torch computes instead: {wrong}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not wrong


def _worst(op: Op, device: torch.device) -> str:
    """Where a kernel is further from fp64 than it may be, in words; empty if nowhere."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        given = op.example(device)
    truth, same, ours = (
        _run(op.reference, given, torch.float64),
        _run(op.reference, given, None),
        _run(op.op, given, None),
    )
    eps = torch.finfo(torch.float32).eps
    for index, (right, plain, found) in enumerate(zip(truth, same, ours, strict=True)):
        size = right.abs().max()
        error, most = (found - right).abs().max(), _SLACK * (plain - right).abs().max() + eps * size
        if not error <= most:
            return f"result {index} is off by {error:.1e}, more than {most:.1e}"
    return ""


def _run(function: Callable[..., Any], given: tuple[Any, ...], dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Results of a function and what it leaves in its arguments, in fp64."""

    def copied(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return each.to(dtype, copy=True) if dtype is not None and each.is_floating_point() else each.clone()

    arguments = tree_map(copied, given)
    found = (function(*arguments), arguments)
    return [each.detach().double() for each in tree_leaves(found) if isinstance(each, torch.Tensor)]

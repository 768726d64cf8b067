"""Registry of ops: the PyTorch reference on any device, or a kernel where one runs.

A kernel is tested on a small example before its first use on a device. If it is less accurate than PyTorch there, it is
not used, and a warning is issued.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.library import CustomOpDef
from torch.utils._pytree import tree_leaves, tree_map

from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.kernels.builder import load

# Limit as a multiple of torch's own error in the same dtype.
_SLACK = 3.0


@dataclass(frozen=True)
class Op:
    """Implementations of one op; all take the same arguments."""

    reference: Callable[..., Any]
    """Plain PyTorch: the ground truth in fp64, the error baseline in other dtypes."""
    op: CustomOpDef
    """Custom op seen by fake tensors, torch.compile and the ledger; launches the Triton kernels."""
    launch: Callable[..., Any]
    """Body of the custom op, for ahead-of-time compilation on meta tensors, where the op would run its fake."""
    example: Callable[[torch.device], tuple[Any, ...]]
    """Small fp32 arguments on a device, for the test before first use."""
    compiled: tuple[str, ...]
    """Names of the csrc ops that replace it on CPU; the custom op dispatches to them, or to the reference if empty."""


_OPS: dict[str, Op] = {}


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    op: CustomOpDef,
    launch: Callable[..., Any],
    example: Callable[[torch.device], tuple[Any, ...]],
    compiled: tuple[str, ...] = (),
) -> Op:
    """Register an op for ``pick`` and the tests."""
    if not compiled and not triton.knobs.runtime.interpret:
        op.register_kernel("cpu", reference)
    _OPS[name] = Op(reference, op, launch, example, compiled)
    return _OPS[name]


def registered() -> dict[str, Op]:
    """Return all ops by name."""
    return dict(_OPS)


def runs_on(device: torch.device) -> bool:
    """Return True if Triton kernels run: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or triton.knobs.runtime.interpret


def load_tile_ops(device_type: str) -> None:
    """Load the compiled csrc ops for a device, unless Triton's interpreter is on."""
    if not triton.knobs.runtime.interpret:
        load("tile_ops", device_type)


def has_kernel(name: str, device: torch.device) -> bool:
    """Return True if a Triton kernel, or csrc op on CPU, runs an op.

    The first call compiles and tests it, which takes seconds.
    """
    if triton.knobs.runtime.interpret:
        return True  # requested explicitly, and a test would take longer than its use
    if device.type == "cuda" and not torch.cuda.is_available():
        return True  # fake tensors of a machine with a GPU
    if device.type == "cpu":
        load_tile_ops("cpu")
        names = [f"deepspeed_alst::{each}" for each in _OPS[name].compiled]
        if not names or not all(torch._C._dispatch_has_kernel_for_dispatch_key(each, "CPU") for each in names):
            return False
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device.type in ("cpu", "cuda") and _is_proven(name, device.type, device.index)


def pick(name: str, device: torch.device) -> Callable[..., Any]:
    """Return the function that computes an op on a device."""
    op = _OPS[name]
    return op.op if has_kernel(name, device) else op.reference


@functools.cache
def _is_proven(name: str, device_type: str, index: int | None) -> bool:
    """Return True if an op's kernel agrees with its reference on a device; warn if not."""
    try:
        wrong = run_isolated(_worst, _OPS[name], torch.device(device_type, index))
    except Exception as error:  # compilers and drivers raise many types; training can go on
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"deepspeed_alst: the kernel of {name} is not used on {device_type}, torch computes instead: {wrong}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not wrong


def _worst(op: Op, device: torch.device) -> str:
    """Describe the first result whose error against fp64 exceeds the limit; empty if none does."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # sets it for this thread
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
    """Return a function's results and its arguments after the call, in fp64."""

    def copied(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return each.to(dtype, copy=True) if dtype is not None and each.is_floating_point() else each.clone()

    arguments = tree_map(copied, given)
    found = (function(*arguments), arguments)
    return [each.detach().double() for each in tree_leaves(found) if isinstance(each, torch.Tensor)]

"""Choice between an op's Triton kernel and its PyTorch reference.

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
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import CustomOpDef
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import Autotuner, JITFunction

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import SLACK, run_isolated


@dataclass(frozen=True)
class Op:
    """Implementations of one op; all take the same arguments."""

    reference: Callable[..., Any]
    """Plain PyTorch: the ground truth in fp64, the error baseline in other dtypes, and what runs without a kernel."""
    op: CustomOpDef
    """Custom op seen by fake tensors, torch.compile and the ledger; launches the Triton kernels."""
    launch: Callable[..., Any]
    """Body of the custom op, for ahead-of-time compilation on meta tensors, where the op would run its fake."""
    example: Callable[[torch.device], tuple[Any, ...]]
    """Small fp32 arguments on a device, for the test before first use."""

    def __post_init__(self) -> None:
        if not triton.knobs.runtime.interpret:
            self.op.register_kernel("cpu", self.reference)


OPS: dict[str, Op] = {}


def runs_on(device: torch.device) -> bool:
    """Return True if Triton kernels run: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or triton.knobs.runtime.interpret


def has_kernel(name: str, device: torch.device) -> bool:
    """Return True if a Triton kernel runs an op on a device; fake tensors stand for a GPU's.

    The first call compiles and tests the kernel, which takes seconds.
    """
    # Under the interpreter, which is asked for by name, a test would take longer than its use.
    if triton.knobs.runtime.interpret or active_fake_mode() is not None:
        return True
    if device.type != "cuda":
        return False
    return _is_proven(name, torch.cuda.current_device() if device.index is None else device.index)


def pick(name: str, x: torch.Tensor) -> Callable[..., Any]:
    """Return the function that computes an op on a tensor's device; fp64 is left to the reference."""
    is_kernel = x.dtype != torch.float64 and has_kernel(name, x.device)
    return OPS[name].op if is_kernel else OPS[name].reference


@functools.cache
def _is_proven(name: str, index: int) -> bool:
    """Return True if an op's kernel agrees with its reference on a GPU; warn if not."""
    try:
        wrong = run_isolated(_worst, OPS[name], torch.device("cuda", index))
    except Exception as error:  # compilers and drivers raise many types; training can go on
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        warnings.warn(
            f"deepspeed_alst: the kernel of {name} is not used on cuda:{index}, torch computes instead: {wrong}",
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
        error, most = (found - right).abs().max(), SLACK * (plain - right).abs().max() + eps * size
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


def skip_fake_launches(patches: PatchSet) -> None:
    """Skip Triton kernels whose arguments are fake: of Liger's functions, what they allocate is left to measure."""

    def unless_fake(run: Any) -> Any:
        def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(each, FakeTensor) for each in (*args, *kwargs.values())):
                return run(self, *args, **kwargs)

        return launch

    for kind in (JITFunction, Autotuner):
        patches.wrap(kind, "run", unless_fake)

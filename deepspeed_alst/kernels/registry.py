"""Choice between an op's Triton kernel and its PyTorch reference.

A kernel is checked on a small example before its first use on a device, and disabled with a warning if it is less
accurate than PyTorch.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import CustomOpDef
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime import Autotuner, JITFunction
from triton.runtime.interpreter import InterpretedFunction

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import SLACK, run_isolated


@dataclass(frozen=True)
class Op:
    """Implementations of one op; all take the same arguments."""

    reference: Callable[..., Any]
    """PyTorch implementation: ground truth in fp64, error baseline in other dtypes, fallback without a kernel."""
    op: CustomOpDef
    """Custom op that launches the Triton kernels, visible to fake tensors, torch.compile and the ledger."""
    launch: Callable[..., Any]
    """Body of the custom op, for ahead-of-time compilation on meta tensors, where the op would run its fake."""
    example: Callable[[torch.device], tuple[Any, ...]]
    """Small fp32 arguments on a device, for the check before first use."""

    def __post_init__(self) -> None:
        if not triton.knobs.runtime.interpret:
            self.op.register_kernel("cpu", self.reference)


OPS: dict[str, Op] = {}


def runs_on(device: torch.device) -> bool:
    """Return True if Triton kernels run: on a GPU, or under Triton's interpreter (TRITON_INTERPRET=1)."""
    return device.type == "cuda" or triton.knobs.runtime.interpret


def has_kernel(name: str, device: torch.device) -> bool:
    """Return True if a Triton kernel runs an op on a device; fake tensors count as GPU tensors.

    The first call compiles and checks the kernel, which takes seconds.
    """
    # The interpreter is explicitly requested, and a check would take longer than the use.
    if triton.knobs.runtime.interpret or active_fake_mode() is not None:
        return True
    if device.type != "cuda":
        return False
    return _passes_check(name, torch.cuda.current_device() if device.index is None else device.index)


def pick(name: str, x: torch.Tensor) -> Callable[..., Any]:
    """Return the function that computes an op on a tensor's device; fp64 uses the reference."""
    is_kernel = x.dtype != torch.float64 and has_kernel(name, x.device)
    return OPS[name].op if is_kernel else OPS[name].reference


def launch_config(configs: Sequence[tuple[int, int]], width: int) -> tuple[int, int]:
    """Return the first ``(block, warps)`` whose block holds a row of this width, else the last."""
    return next((each for each in configs if each[0] >= width), configs[-1])


@functools.cache
def _passes_check(name: str, index: int) -> bool:
    """Return True if an op's kernel agrees with its reference on a GPU; warn if not."""
    try:
        problem = run_isolated(_find_mismatch, OPS[name], torch.device("cuda", index))
    except Exception as error:  # compilers and drivers raise many types; training can go on
        problem = f"{type(error).__name__}: {error}"
    if problem:
        warnings.warn(
            f"deepspeed_alst: the Triton kernel of {name} is disabled on cuda:{index}, PyTorch computes it: {problem}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not problem


def _find_mismatch(op: Op, device: torch.device) -> str:
    """Describe the first result whose error against fp64 exceeds the limit; empty if none does."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the current device is per thread
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        arguments = op.example(device)
    truths = _run(op.reference, arguments, torch.float64)
    references, results = (_run(function, arguments, None) for function in (op.reference, op.op))
    eps = torch.finfo(torch.float32).eps
    for index, (truth, reference, result) in enumerate(zip(truths, references, results, strict=True)):
        error = (result - truth).abs().max()
        limit = SLACK * (reference - truth).abs().max() + eps * truth.abs().max()
        if not error <= limit:
            return f"result {index} has error {error:.1e}, above {limit:.1e}"
    return ""


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Return a function's results and its arguments after the call, in fp64."""

    def copy(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(dtype, copy=True) if dtype is not None and value.is_floating_point() else value.clone()

    arguments = tree_map(copy, arguments)
    tensors = tree_leaves((function(*arguments), arguments))
    return [each.detach().double() for each in tensors if isinstance(each, torch.Tensor)]


def skip_fake_launches(patches: PatchSet) -> None:
    """Skip Triton launches with fake arguments, so that the allocations of Liger's functions can be measured."""

    def unless_fake(run: Any) -> Any:
        def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(each, FakeTensor) for each in (*args, *kwargs.values())):
                return run(self, *args, **kwargs)

        return launch

    for kind in (JITFunction, Autotuner, InterpretedFunction):
        patches.wrap(kind, "run", unless_fake)

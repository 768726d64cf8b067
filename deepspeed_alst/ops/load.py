"""Loading of the compiled ops of ``csrc/``, once per process, with a warning if unavailable."""

import functools
import warnings

import torch


@functools.cache
def load(library: str, device_type: str, what: str) -> str:
    """Load a library's kernels over the PyTorch references, and return which one will compute.

    A prebuilt library is preferred; else it is built, which takes some seconds the first time. If neither works, torch
    computes with the same result, and a warning gives the reason and a fix.

    Args:
        library: a name of ``ops.builder.BUILDERS``.
        device_type: ``"cpu"`` or ``"cuda"``.
        what: the computation, in words, for the warning.

    Returns:
        ``"csrc op"``, or ``"torch (<why>)"``.
    """
    from deepspeed_alst.ops.build_once import OpBuildError
    from deepspeed_alst.ops.builder import BUILDERS

    if (library, device_type) not in BUILDERS:
        return f"torch (no csrc op for {device_type})"
    builder = BUILDERS[library, device_type]
    try:
        builder().load(verbose=False)
        if not all(is_compiled(op, device_type) for op in builder.OPS):
            raise OpBuildError("its library registers no kernel", "rebuild it")
    except Exception as error:  # compilers raise many types; training can go on
        reason = str(error) if isinstance(error, OpBuildError) else f"{type(error).__name__}: {error}"
        way_out = error.way_out if isinstance(error, OpBuildError) else "see the compiler's messages above"
        warnings.warn(
            f"deepspeed_alst: {what} on {device_type} runs in torch, slower and with the same result: {reason}. "
            f"Way out: {way_out}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"torch ({reason.splitlines()[0]})"
    return "csrc op"


def is_compiled(op: str, device_type: str) -> bool:
    """Return True if a compiled kernel of ``deepspeed_alst::<op>`` is registered for a device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"deepspeed_alst::{op}", device_type.upper())

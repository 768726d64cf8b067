"""Liger's kernels run by Triton's interpreter: what of them it cannot run is replaced by what computes the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import triton
import triton.language as tl

from benchmarks.kernels.interpreter import Traffic, faithful
from deepspeed_alst.core.patching import PatchSet


@triton.jit
def rsqrt(x):
    return tl.math.rsqrt(x)


@contextmanager
def faithful_liger() -> Iterator[Traffic]:
    """As ``faithful``, with torch-like tanh and rsqrt for libdevice's, and the first of a kernel's configurations."""
    from liger_kernel.ops import cross_entropy, fused_moe_kernels, geglu, layer_norm, rms_norm

    from deepspeed_alst.kernels.cross_entropy import _tanh

    with PatchSet() as undo:

        def replace(owner: ModuleType, name: str, value: object) -> None:
            undo.enter_context(mock.patch.object(owner, name, value))

        for module in (rms_norm, layer_norm):
            replace(module, "rsqrt", rsqrt)
        for module in (cross_entropy, geglu):
            replace(module, "tanh", _tanh)
        for kernel in vars(fused_moe_kernels).values():
            if isinstance(kernel, triton.runtime.Autotuner):
                replace(kernel, "configs", kernel.configs[:1])
        yield undo.enter_context(faithful())

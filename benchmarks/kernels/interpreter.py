"""Triton's interpreter with GPU-like bf16, bounds checks, and counts of bytes moved.

Unpatched (Triton 3.9), it truncates where a GPU rounds to bf16, treats the bits of bf16 values as integers in
arithmetic, passes floats as Python floats, and allows access to any address. Programs run one after another, so races
between threads are not detected.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

_ARITHMETIC = ("binary_op", "unary_op", "create_fma", "create_fabs")


@dataclass
class Traffic:
    """Bytes of a kernel's loads and stores, masked lanes excluded."""

    read: int = 0
    written: int = 0


class OutOfBoundsError(IndexError):
    """Access of a kernel outside its tensors."""


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 values to bf16, to nearest even, and return the bits."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()


@contextmanager
def faithful() -> Iterator[Traffic]:
    """Patch the interpreter as described above; needs a process started with TRITON_INTERPRET=1."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1 before triton is imported"
    from triton.runtime import interpreter

    traffic, builder = Traffic(), interpreter.InterpreterBuilder
    with ExitStack() as undo:

        def replace(owner: Any, name: str, make: Any) -> None:
            undo.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

        replace(builder, "cast_impl", _casting(interpreter))
        for name in _ARITHMETIC:
            replace(builder, name, _without_bf16)
        replace(interpreter.ReduceScanOpInterface, "check_tensor", _reducing)
        replace(interpreter, "_implicit_cvt", _with_fp32_scalars(interpreter))
        ranges: list[tuple[int, int]] = []
        replace(interpreter.GridExecutor, "_init_args_hst", _noting(ranges))
        replace(builder, "create_masked_load", _counting("read", 0, ranges, traffic))
        replace(builder, "create_masked_store", _counting("written", 1, ranges, traffic))
        yield traffic


def _is_bf16(handle: Any) -> bool:
    return getattr(getattr(handle, "dtype", None), "scalar", None) is not None and str(handle.dtype.scalar) == "bf16"


def _casting(interpreter: Any) -> Any:
    import triton.language as tl

    def make(original: Any) -> Any:
        def cast_impl(self: Any, source: Any, target: Any) -> Any:
            if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
                bits = round_to_bf16(source.data).reshape(source.data.shape)
                return interpreter.TensorHandle(bits, tl.bfloat16)
            return original(self, source, target)

        return cast_impl

    return make


def _without_bf16(original: Any) -> Any:
    def guarded(self: Any, *args: Any) -> Any:
        if any(_is_bf16(each) for each in args):
            raise TypeError("arithmetic on bf16 values: the interpreter takes their bits for integers; cast them first")
        return original(self, *args)

    return guarded


def _reducing(original: Any) -> Any:
    def check_tensor(self: Any, values: Any) -> Any:
        if any(_is_bf16(each.handle) for each in values):
            raise TypeError(
                "a reduction of bf16 values: the interpreter takes their bits for integers; cast them first"
            )
        return original(self, values)

    return check_tensor


def _with_fp32_scalars(interpreter: Any) -> Any:
    import triton.language as tl

    def make(original: Any) -> Any:
        def implicit(argument: Any) -> Any:
            if type(argument) is not float:
                return original(argument)
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

        return implicit

    return make


def _noting(ranges: list[tuple[int, int]]) -> Any:
    """Record the address ranges of a launch's tensors."""

    def make(original: Any) -> Any:
        def init(self: Any, args: Any, kwargs: Any) -> Any:
            found = original(self, args, kwargs)
            ranges.clear()
            for each in tree_leaves(found):
                if isinstance(each, torch.Tensor) and each.numel():
                    last = sum((size - 1) * stride for size, stride in zip(each.shape, each.stride(), strict=True))
                    ranges.append((each.data_ptr(), each.data_ptr() + (last + 1) * each.element_size()))
            return found

        return init

    return make


def _touched(what: str, pointers: Any, mask: np.ndarray, ranges: list[tuple[int, int]]) -> int:
    """Return the bytes of the active lanes.

    Raises:
        OutOfBoundsError: a lane is outside all tensors.
    """
    lanes, size = np.broadcast_arrays(pointers.data, mask), pointers.get_element_ty().primitive_bitwidth // 8
    addresses = lanes[0][lanes[1].astype(bool)].astype(np.int64)
    inside = np.zeros(addresses.shape, dtype=bool)
    for begin, end in ranges:
        inside |= (addresses >= begin) & (addresses + size <= end)
    if not inside.all():
        raise OutOfBoundsError(f"{what}: {int((~inside).sum())} of {inside.size} lanes are beyond the kernel's tensors")
    return addresses.size * size


def _counting(what: str, mask_at: int, ranges: list[tuple[int, int]], traffic: Traffic) -> Any:
    """Check and count accesses; the mask is the argument at this place after the pointers."""

    def make(original: Any) -> Any:
        def access(self: Any, pointers: Any, *rest: Any) -> Any:
            moved = _touched("load" if what == "read" else "store", pointers, rest[mask_at].data, ranges)
            setattr(traffic, what, getattr(traffic, what) + moved)
            return original(self, pointers, *rest)

        return access

    return make

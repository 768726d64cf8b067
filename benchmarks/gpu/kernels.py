"""Kernels on the device: in use, as exact as torch, and as fast as a copy of their bytes and as Liger's.

Legend: P pieces, n elements.
"""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.figures import Figure
from benchmarks.gpu.jobs import guarded
from benchmarks.gpu.scale import Scale, rates, seconds_of
from benchmarks.kernels.gpu import OF_A_COPY, OF_LIGERS, launches
from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import subjects, title
from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces, sum_pieces_reference
from deepspeed_alst.kernels.builder import load
from deepspeed_alst.kernels.registry import OPS, has_kernel


def rows(scale: Scale) -> Iterator[Figure]:
    """Yield the device's rates, then each kernel's error and time."""
    copied, computed = rates(scale)
    yield Figure("copy, reads and writes", (f"{copied / 1e9:,.1f} GB/s",))
    yield Figure("bf16 matmul", (f"{computed / 1e12:,.2f} TFLOP/s",))
    yield from guarded("csrc op", _sums, scale, copied)
    for subject in subjects():
        yield from guarded(subject.__name__.rsplit(".", 1)[-1], _errors, scale, subject)
    yield from guarded("in use", _in_use, scale)  # the subjects have imported the ops
    yield from guarded("times", _times, scale, copied)


def _in_use(scale: Scale) -> Iterator[Figure]:
    for name in OPS:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = has_kernel(name, torch.device(scale.device, 0 if scale.on_gpu else None))
        why = "; ".join(str(each.message) for each in caught) or "torch computes it"
        yield Figure(f"{name}: Triton kernel", ("in use" if runs else why,), "in use", runs)


def _errors(scale: Scale, subject: Any) -> Iterator[Figure]:
    for case in subject.CASES:
        verdict = subject.judge(case, nullcontext if scale.on_gpu else faithful, scale.device)
        error, most = verdict.errors[verdict.worst]
        name = f"{subject.__name__.rsplit('.', 1)[-1]} {title(case)}"
        text = f"{verdict.worst}: {error:.1e} of {most:.1e}"
        yield Figure(name, (text,), "3 x torch's error", verdict.is_accurate, brief=False)


def _sums(scale: Scale, copied: float) -> Iterator[Figure]:
    words = load(scale.device)
    yield Figure("csrc op", (words,), "built", words == "csrc op")
    for dtype, into in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16), (torch.float32,) * 2):
        pieces_Pn = torch.randn(5, 1_000_003, device=scale.device).to(dtype)
        got_n, same_n = (torch.empty(pieces_Pn.shape[1], dtype=into, device=scale.device) for _ in range(2))
        sum_pieces(pieces_Pn, got_n, 0.37)
        sum_pieces_reference(pieces_Pn, same_n, 0.37)
        wrong = int((got_n != same_n).sum())
        yield Figure(f"sum of 5 pieces, {dtype} to {into}", (f"{wrong} elements differ",), "0", not wrong)
    pieces_Pn = torch.randn(8, scale.copy_bytes // 16, device=scale.device).bfloat16()
    out_n = torch.empty(pieces_Pn.shape[1], device=scale.device)
    seconds = seconds_of(scale, lambda: sum_pieces(pieces_Pn, out_n, 1.0))
    yield _time(scale, f"sum of 8 pieces of {out_n.numel():,}", seconds, pieces_Pn.nbytes + out_n.nbytes, copied)


def _times(scale: Scale, copied: float) -> Iterator[Figure]:
    for each in launches(scale.device, scale.kernels):
        seconds = seconds_of(scale, each.run)
        ligers = seconds_of(scale, each.ligers) if each.ligers and scale.on_gpu else None
        yield _time(scale, each.name, seconds, each.moved, copied, ligers)


def _time(scale: Scale, name: str, seconds: float, moved: int, copied: float, ligers: float | None = None) -> Figure:
    share = moved / seconds / copied
    text = f"{1e3 * seconds:.3f} ms, {share:.2f} of a copy's rate"
    text += f", {seconds / ligers:.2f} x Liger's time" if ligers else ""
    if not scale.on_gpu:  # interpreted, or one call
        return Figure(name, (text,))
    met = share >= OF_A_COPY and (ligers is None or seconds <= OF_LIGERS * ligers)
    return Figure(name, (text,), f">= {OF_A_COPY} of a copy" + f", <= {OF_LIGERS} x" * bool(ligers), met)

"""Kernels on the device: in use, as exact as torch, and as fast as a copy of their bytes and as Liger's.

Legend: P pieces, n elements; T tokens, V vocabulary, F inner features, h heads, D head size.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from benchmarks.figures import Figure
from benchmarks.gpu.jobs import guarded
from benchmarks.gpu.scale import Scale, Sizes, rates, seconds_of
from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import subjects, title
from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces, sum_pieces_reference
from deepspeed_alst.kernels.builder import load
from deepspeed_alst.kernels.registry import OPS, has_kernel

OF_A_COPY = 0.7
"""Minimum share of a copy's bandwidth."""
OF_LIGERS = 1.05
"""Maximum time relative to Liger's."""


class Launch(NamedTuple):
    """One kernel on one input."""

    name: str
    run: Callable[[], Any]
    moved: int
    """Bytes read and written."""
    ligers: Callable[[], Any] | None = None


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


# --- what is timed


def launches(device: str, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> Iterator[Launch]:
    """Yield the kernels; repeated in-place runs leave meaningless values."""
    yield _cross_entropy(device, sizes, dtype)
    yield from _activations(device, sizes, dtype)
    yield _pack(device, sizes, dtype)
    yield from _codec(device, sizes)


def _cross_entropy(device: str, s: Sizes, dtype: torch.dtype) -> Launch:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    from deepspeed_alst.kernels.cross_entropy import cross_entropy_

    rows = max(4, s.T // 8)
    logits_tV, scale = torch.randn(rows, s.V, device=device, dtype=dtype), torch.ones((), device=device)
    labels_t = torch.randint(0, s.V, (rows,), device=device)
    leaf_tV = torch.randn(rows, s.V, device=device, dtype=dtype).requires_grad_()
    return Launch(
        f"cross-entropy, [{rows}, {s.V}]",
        lambda: cross_entropy_(logits_tV, labels_t, scale),
        3 * logits_tV.nbytes,
        lambda: LigerCrossEntropyFunction.apply(leaf_tV, labels_t, None),
    )


def _activations(device: str, s: Sizes, dtype: torch.dtype) -> Iterator[Launch]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    from deepspeed_alst.kernels.gated import gated_activation_, gated_gradients_

    gate_TF, up_TF, grad_TF = (torch.randn(s.T, s.F, device=device, dtype=dtype) for _ in range(3))
    yield Launch(
        f"SwiGLU, [{s.T}, {s.F}]",
        lambda: gated_activation_(gate_TF, up_TF, "silu"),
        3 * gate_TF.nbytes,
        lambda: LigerSiLUMulFunction.apply(gate_TF, up_TF),
    )
    yield Launch(
        f"SwiGLU, backward, [{s.T}, {s.F}]",
        lambda: gated_gradients_(gate_TF, up_TF, grad_TF, "silu"),
        6 * gate_TF.nbytes,
    )


def _pack(device: str, s: Sizes, dtype: torch.dtype) -> Launch:
    from deepspeed_alst.kernels.head_layout import by_heads, pack

    q, k, v = (torch.randn(1, s.T, heads, s.D, device=device, dtype=dtype) for heads in (s.h, s.h // 4, s.h // 4))
    pieces = [by_heads(x.transpose(1, 2), 4) for x in (q, k, v)]
    return Launch(f"pack for 4 ranks, {s.T} tokens", lambda: pack(pieces, 4), 2 * (q.nbytes + 2 * k.nbytes))


def _codec(device: str, s: Sizes) -> Iterator[Launch]:
    from deepspeed_alst.kernels.bf16_codec import pack_, packed_bytes, unpack_

    x_n = torch.randn(s.T * s.h * s.D, device=device).bfloat16()
    packed_m = torch.empty(packed_bytes(x_n.numel()), dtype=torch.uint8, device=device)
    pack_(x_n, packed_m)  # to be unpacked
    # Least bytes: 11 bits of a value without escapes.
    moved = x_n.nbytes + x_n.numel() * 11 // 8
    yield Launch(f"pack bf16, {x_n.numel():,} values", lambda: pack_(x_n, packed_m), moved)
    yield Launch(f"unpack bf16, {x_n.numel():,} values", lambda: unpack_(packed_m, x_n), moved)

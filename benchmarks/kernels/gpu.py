"""Kernel times on a GPU, against a copy of as many bytes and against Liger's kernels.

It has not been run on a GPU yet; tests run its launches at small sizes on CPU, in Triton's interpreter.

Legend: T tokens, V vocabulary, F inner features, h heads, D head size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

OF_A_COPY = 0.7
"""Minimum share of a copy's bandwidth."""
OF_LIGERS = 1.05
"""Maximum time relative to Liger's."""


@dataclass(frozen=True)
class Launch:
    """One kernel on one input."""

    name: str
    run: Callable[[], Any]
    moved: int
    """Bytes read and written."""
    ligers: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of a layer and of a loss tile; Llama-3.1-8B's."""

    T: int = 16384
    V: int = 128256
    F: int = 14336
    h: int = 32
    D: int = 128


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


def copy_bytes_a_second(
    seconds_of: Callable[[Callable[[], Any]], float], device: str = "cuda", num_bytes: int = 2**30
) -> float:
    """Return the bandwidth of a copy on the device, reads and writes, in bytes/s."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))


def seconds_on_gpu(function: Callable[[], Any]) -> float:
    """Return the median seconds of a launch, by device timers."""
    import triton

    return triton.testing.do_bench(function, return_mode="median") / 1e3

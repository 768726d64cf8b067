"""Rotary position embedding of queries and keys in one launch, which saves only cos and sin for the backward.

Pairs (a, b) of a head's first ``rotary`` elements become ``(a cos_a - b sin_a, b cos_b + a sin_b)`` (arXiv:2104.09864);
the others are copied. The math is in fp32, and rounded once. The backward is the transposed rotation, by the same
kernel. rope_ops.py states the bytes moved per launch. On CPU torch computes.

The results are new tensors in the projection's layout, with a token's heads adjacent, so that attention's gradient
reaches the projection without another copy. An in-place kernel would corrupt values that others saved, which autograd
does not tell, and would not lower a layer's peak, which is in its MLP.

Legend: B batch, s tokens, h query heads, g key heads, D head dim, W entries of a token in cos and sin.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels.rope_ops import rope_op

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BshD: torch.Tensor,
        k_BsgD: torch.Tensor,
        cos_BsW: torch.Tensor,
        sin_BsW: torch.Tensor,
        rotary: int,
        interleaved: bool,
        shared: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos_BsW, sin_BsW)
        ctx.how = rotary, interleaved, shared
        return _rotate(q_BshD, k_BsgD, cos_BsW, sin_BsW, *ctx.how, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_BshD: torch.Tensor, dk_BsgD: torch.Tensor) -> tuple[Any, ...]:
        return *_rotate(dq_BshD, dk_BsgD, *ctx.saved_tensors, *ctx.how, True), None, None, None, None, None


def _rotate(
    q_BshD: torch.Tensor, k_BsgD: torch.Tensor, cos_BsW: torch.Tensor, sin_BsW: torch.Tensor, *how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = (q_BshD, k_BsgD, cos_BsW, sin_BsW)
    return rope_op(*(each if each.stride(-1) == 1 else each.contiguous() for each in tensors), *how)


def _check(
    q_BshD: torch.Tensor,
    k_BsgD: torch.Tensor,
    cos_BsW: torch.Tensor,
    sin_BsW: torch.Tensor,
    rotary: int,
    shared: bool,
) -> None:
    B, s = q_BshD.shape[:2]
    table = cos_BsW.shape
    if q_BshD.dim() != 4 or k_BsgD.dim() != 4 or k_BsgD.shape[:2] != (B, s) or k_BsgD.shape[3] != q_BshD.shape[3]:
        wrong = "q and k must be [B, s, heads, D] of the same B, s and D"
    elif rotary % 2 or not 2 <= rotary <= q_BshD.shape[3]:
        wrong = "rotary must be even, and at most D"
    elif len(table) != 3 or sin_BsW.shape != table or table[0] not in (1, B) or table[1] != s:
        wrong = "cos and sin must be [B or 1, s, W]"
    elif table[2] < (rotary // 2 if shared else rotary):
        wrong = "cos and sin have too few entries for rotary"
    elif q_BshD.dtype not in DTYPES or k_BsgD.dtype != q_BshD.dtype:
        wrong = f"q and k must be of one dtype of {', '.join(map(str, DTYPES))}"
    elif not cos_BsW.is_floating_point() or sin_BsW.dtype != cos_BsW.dtype or cos_BsW.requires_grad:
        wrong = "cos and sin must be of one floating-point dtype, and need no gradient"
    elif not q_BshD.device == k_BsgD.device == cos_BsW.device == sin_BsW.device:
        wrong = "q, k, cos and sin must be on one device"
    else:
        return
    shown = ", ".join(
        f"{name} {list(each.shape)}, {each.dtype} on {each.device}"
        for name, each in (("q", q_BshD), ("k", k_BsgD), ("cos", cos_BsW), ("sin", sin_BsW))
    )
    raise ShapeError(f"rope: {wrong}; {shown}, rotary {rotary}")


def rope(
    q_BshD: torch.Tensor,
    k_BsgD: torch.Tensor,
    cos_BsW: torch.Tensor,
    sin_BsW: torch.Tensor,
    rotary: int,
    interleaved: bool = False,
    shared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply rotary embedding to queries and keys: ``[B, s, h, D], [B, s, g, D]``, any strides, to contiguous.

    Args:
        q_BshD: bf16, fp16 or fp32.
        k_BsgD: same dtype.
        cos_BsW: any floating-point dtype; the batch dim may be 1.
        sin_BsW: as cos.
        rotary: number of leading head elements that are rotated.
        interleaved: pairs are elements (2i, 2i + 1) as in GLM; else (i, i + rotary / 2) as in Llama.
        shared: both elements of pair i use entry i of the tables; else each element uses its own.

    Raises:
        ShapeError: incompatible sizes, dtypes or devices.
    """
    _check(q_BshD, k_BsgD, cos_BsW, sin_BsW, rotary, shared)
    return _Rope.apply(q_BshD, k_BsgD, cos_BsW, sin_BsW, rotary, interleaved, shared)

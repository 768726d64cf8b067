"""Op of the rotary position embedding: PyTorch reference, Triton kernel, registration. rope.py calls it.

Bytes moved per element of q and k: 2 * itemsize, read once and written once. cos and sin are read once per token, an
overhead of one in the total number of q and k heads. This is the minimum.

Legend: B batch, s tokens, h query heads, g key heads, D head dim, W entries of a token in cos and sin.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from deepspeed_alst.kernels.registry import register

_PAIRS_A_TILE = 1024


def rope_reference(
    q_BshD: torch.Tensor,
    k_BsgD: torch.Tensor,
    cos_BsW: torch.Tensor,
    sin_BsW: torch.Tensor,
    rotary: int,
    interleaved: bool = False,
    shared: bool = False,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``rope`` in PyTorch: ``[B, s, heads, D]`` twice; fp64 stays fp64."""
    half = rotary // 2
    a, b = (slice(0, rotary, 2), slice(1, rotary, 2)) if interleaved else (slice(0, half), slice(half, rotary))
    of_a, of_b = (slice(0, half), slice(0, half)) if shared else (a, b)

    def turn(x: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = cos_BsW[:, :, None].to(wide), sin_BsW[:, :, None].to(wide)
        x_a, x_b = x[..., a].to(wide), x[..., b].to(wide)
        sin_a, sin_b = (-sin[..., of_b], -sin[..., of_a]) if inverse else (sin[..., of_a], sin[..., of_b])
        y = x.clone(memory_format=torch.contiguous_format)
        y[..., a] = (x_a * cos[..., of_a] - x_b * sin_a).to(x.dtype)
        y[..., b] = (x_b * cos[..., of_b] + x_a * sin_b).to(x.dtype)
        return y

    return turn(q_BshD), turn(k_BsgD)


@triton.jit
def _turn(
    x_ptr,
    y_ptr,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    a,
    b,
    head_stride,
    num_heads,
    D,
    half,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    for head in range(0, num_heads, HEADS):
        heads = head + tl.arange(0, HEADS)[:, None]
        inside = (heads < num_heads) & (tl.arange(0, PAIRS) < half)[None, :]
        x_a = tl.load(x_ptr + heads * head_stride + a[None, :], mask=inside, other=0.0).to(tl.float32)
        x_b = tl.load(x_ptr + heads * head_stride + b[None, :], mask=inside, other=0.0).to(tl.float32)
        y_a = x_a * cos_a[None, :] - x_b * sin_a[None, :]
        y_b = x_b * cos_b[None, :] + x_a * sin_b[None, :]
        tl.store(y_ptr + heads * D + a[None, :], y_a.to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + heads * D + b[None, :], y_b.to(y_ptr.dtype.element_ty), mask=inside)
        if REST:
            columns = 2 * half + tl.arange(0, REST)[None, :]
            inside = (heads < num_heads) & (columns < D)
            rest = tl.load(x_ptr + heads * head_stride + columns, mask=inside, other=0.0)
            tl.store(y_ptr + heads * D + columns, rest, mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    to_q_ptr,
    to_k_ptr,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    cos_batch,
    cos_token,
    sin_batch,
    sin_token,
    s,
    q_heads,
    k_heads,
    D,
    half,
    INTERLEAVED: tl.constexpr,
    SHARED: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # q and k of one token; B*s*h*D exceeds 2**31
    batch, token = row // s, row % s
    lanes = tl.arange(0, PAIRS)
    inside = lanes < half
    if INTERLEAVED:
        a, b = 2 * lanes, 2 * lanes + 1
    else:
        a, b = lanes, lanes + half
    cos_ptr += batch * cos_batch + token * cos_token
    sin_ptr += batch * sin_batch + token * sin_token
    if SHARED:
        cos_a = tl.load(cos_ptr + lanes, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + lanes, mask=inside, other=0.0).to(tl.float32)
        cos_b, sin_b = cos_a, sin_a
    else:
        cos_a = tl.load(cos_ptr + a, mask=inside, other=0.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + b, mask=inside, other=0.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + a, mask=inside, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + b, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        sin_a, sin_b = -sin_b, -sin_a
    q_ptr += batch * q_batch + token * q_token
    k_ptr += batch * k_batch + token * k_token
    to_q_ptr += row * q_heads * D
    to_k_ptr += row * k_heads * D
    _turn(q_ptr, to_q_ptr, cos_a, cos_b, sin_a, sin_b, a, b, q_head, q_heads, D, half, HEADS, PAIRS, REST)
    _turn(k_ptr, to_k_ptr, cos_a, cos_b, sin_a, sin_b, a, b, k_head, k_heads, D, half, HEADS, PAIRS, REST)


def _launch(
    q_BshD: torch.Tensor,
    k_BsgD: torch.Tensor,
    cos_BsW: torch.Tensor,
    sin_BsW: torch.Tensor,
    rotary: int,
    interleaved: bool,
    shared: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, s, h, D = q_BshD.shape
    to_q_BshD, to_k_BsgD = q_BshD.new_empty(q_BshD.shape), k_BsgD.new_empty(k_BsgD.shape)
    pairs, rest = triton.next_power_of_2(rotary // 2), D - rotary
    if B * s:
        _rope_kernel[(B * s,)](
            q_BshD,
            k_BsgD,
            cos_BsW,
            sin_BsW,
            to_q_BshD,
            to_k_BsgD,
            *q_BshD.stride()[:3],
            *k_BsgD.stride()[:3],
            *_by_token(cos_BsW),
            *_by_token(sin_BsW),
            s,
            h,
            k_BsgD.shape[2],
            D,
            rotary // 2,
            INTERLEAVED=interleaved,
            SHARED=shared,
            INVERSE=inverse,
            HEADS=max(1, min(_PAIRS_A_TILE // pairs, triton.next_power_of_2(h))),
            PAIRS=pairs,
            REST=triton.next_power_of_2(rest) if rest else 0,
            num_warps=4,
        )
    return to_q_BshD, to_k_BsgD


def _by_token(table_BsW: torch.Tensor) -> tuple[int, int]:
    """Return a table's batch and token strides; a shared table has batch stride 0."""
    return (table_BsW.stride(0) if table_BsW.shape[0] > 1 else 0), table_BsW.stride(1)


rope_op = torch.library.custom_op("deepspeed_alst::rope", _launch, mutates_args=())


@rope_op.register_fake
def _fake(q_BshD, k_BsgD, cos_BsW, sin_BsW, rotary, interleaved, shared, inverse):
    return q_BshD.new_empty(q_BshD.shape), k_BsgD.new_empty(k_BsgD.shape)


def _example(device: torch.device) -> tuple[Any, ...]:
    q_BshD, k_BsgD = torch.randn(2, 5, 6, 80, device=device), torch.randn(2, 5, 2, 80, device=device)
    cos_BsW, sin_BsW = torch.randn(2, 1, 5, 48, device=device)
    return q_BshD, k_BsgD, cos_BsW, sin_BsW, 48, False, False, True


register("rope", reference=rope_reference, op=rope_op, launch=_launch, example=_example)

"""Exact attention of some query rows to the keys and values of a whole sequence, rectangle by rectangle.

Outputs are summed in fp32 and rounded once, weighted by the log-sum-exp of each rectangle's scores; the backward of a
rectangle uses the log-sum-exp of all (FlashAttention, arXiv:2205.14135, section 3.1). A sink is a score without a
value, one per query head.

Legend: B batch, h query heads, k KV heads, R rows, N keys of a rectangle, S whole sequence, D head dim of q and k, E of
v.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from deepspeed_alst.memory_lean.rectangles import Rectangle

_aten = torch.ops.aten
_LARGEST_HEAD = 256  # of torch's flash attention on CUDA


def can_attend(q_BHsD: torch.Tensor) -> bool:
    """Return True if there is a kernel for such queries: torch's flash attention, on CPU or CUDA."""
    if q_BHsD.device.type == "cpu":
        return True
    is_half = q_BHsD.dtype in (torch.bfloat16, torch.float16)
    return q_BHsD.device.type == "cuda" and is_half and q_BHsD.shape[3] <= _LARGEST_HEAD


def attend(
    q_BhRD: torch.Tensor,
    k_BkSD: torch.Tensor,
    v_BkSE: torch.Tensor,
    parts: Iterable[Rectangle],
    first_row: int,
    scale: float | None,
    sinks_h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output ``[B, h, R, E]`` and log-sum-exp ``[B, h, R]``, at least fp32, of rows from ``first_row`` on."""
    B, h, R, _ = q_BhRD.shape
    wide = torch.promote_types(q_BhRD.dtype, torch.float32)
    o_BhRE = q_BhRD.new_zeros(B, h, R, v_BkSE.shape[3], dtype=wide)
    lse_BhR = q_BhRD.new_full((B, h, R), -torch.inf, dtype=wide)
    if sinks_h is not None:
        lse_BhR.copy_(sinks_h[:, None])
    for part in parts:
        rows, keys = _slices(part, first_row)
        q, k, v = q_BhRD[:, :, rows], k_BkSD[:, :, keys], v_BkSE[:, :, keys]
        if part.triangle == "upper":
            q, k, v = q.flip(2), k.flip(2), v.flip(2)
        o, lse = _forward(q, k, v, bool(part.triangle), scale)
        if part.triangle == "upper":
            o, lse = o.flip(2), lse.flip(2)
        before, lse = lse_BhR[:, :, rows], lse.to(wide)
        after = torch.logaddexp(before, lse)
        kept, added = (before - after).exp_()[..., None], (lse - after).exp_()[..., None]
        o_BhRE[:, :, rows] = (o_BhRE[:, :, rows] * kept).addcmul_(o.to(wide), added)
        lse_BhR[:, :, rows] = after
    return o_BhRE.to(q_BhRD.dtype), lse_BhR


def attend_backward(
    do_BhRE: torch.Tensor,
    q_BhRD: torch.Tensor,
    k_BkSD: torch.Tensor,
    v_BkSE: torch.Tensor,
    o_BhRE: torch.Tensor,
    lse_BhR: torch.Tensor,
    dk_BkSD: torch.Tensor,
    dv_BkSE: torch.Tensor,
    parts: Iterable[Rectangle],
    first_row: int,
    scale: float | None,
) -> torch.Tensor:
    """Return the gradient of q; add those of k and v to ``dk_BkSD`` and ``dv_BkSE``, at least fp32."""
    dq_BhRD = torch.zeros_like(q_BhRD, dtype=dk_BkSD.dtype)
    for part in parts:
        rows, keys = _slices(part, first_row)
        of_rows = [x[:, :, rows] for x in (do_BhRE, q_BhRD, o_BhRE, lse_BhR)]
        of_keys = [x[:, :, keys] for x in (k_BkSD, v_BkSE)]
        if part.triangle == "upper":
            of_rows, of_keys = [x.flip(2) for x in of_rows], [x.flip(2) for x in of_keys]
        (do, q, o, lse), (k, v) = of_rows, of_keys
        dq, dk, dv = _backward(do, q, k, v, o, lse, bool(part.triangle), scale)
        if part.triangle == "upper":
            dq, dk, dv = dq.flip(2), dk.flip(2), dv.flip(2)
        dq_BhRD[:, :, rows] += dq
        dk_BkSD[:, :, keys] += dk
        dv_BkSE[:, :, keys] += dv
    return dq_BhRD.to(q_BhRD.dtype)


def sinks_gradient(
    do_Bhe: torch.Tensor, o_Bhe: torch.Tensor, lse_Bh: torch.Tensor, sinks_h: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of sinks ``[h]`` from that of the output, ``[B, h, ..., E]``, of any rows."""
    delta_Bh = torch.linalg.vecdot(do_Bhe.to(lse_Bh.dtype), o_Bhe.to(lse_Bh.dtype))
    weights_Bh = (sinks_h.view(-1, *[1] * (lse_Bh.dim() - 2)) - lse_Bh).exp_()
    return -(weights_Bh * delta_Bh).transpose(0, 1).flatten(1).sum(1)


def _slices(part: Rectangle, first_row: int) -> tuple[slice, slice]:
    return slice(part.first_row - first_row, part.last_row - first_row), slice(part.first_key, part.last_key)


def _forward(
    q_BhRD: torch.Tensor, k_BkND: torch.Tensor, v_BkNE: torch.Tensor, causal: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one rectangle's kernel: output ``[B, h, R, E]`` and log-sum-exp ``[B, h, R]``."""
    E, scale = v_BkNE.shape[3], scale or q_BhRD.shape[3] ** -0.5
    q, k, v = _equal_heads(q_BhRD, k_BkND, v_BkNE)
    if q.device.type == "cuda":
        o, lse, *_ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return o[..., :E], lse
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for q_part, o_part, lse_part in zip(*(_by_kv_head(x, k.shape[1], causal) for x in (q, o, lse)), strict=True):
        found_o, found_lse = _aten._scaled_dot_product_flash_attention_for_cpu(q_part, k, v, 0.0, causal, scale=scale)
        o_part.copy_(found_o)
        lse_part.copy_(found_lse)
    return o[..., :E], lse


def _backward(
    do_BhRE: torch.Tensor,
    q_BhRD: torch.Tensor,
    k_BkND: torch.Tensor,
    v_BkNE: torch.Tensor,
    o_BhRE: torch.Tensor,
    lse_BhR: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return one rectangle's gradients of q, k and v."""
    D, E, scale = q_BhRD.shape[3], v_BkNE.shape[3], scale or q_BhRD.shape[3] ** -0.5
    q, k, v, do, o = _equal_heads(q_BhRD, k_BkND, v_BkNE, do_BhRE, o_BhRE)
    if q.device.type == "cuda":
        # No lengths of packed documents; no dropout, so no random state.
        rows, keys, none = q.shape[2], k.shape[2], q.new_empty(0, dtype=torch.int64)
        found = _aten._scaled_dot_product_flash_attention_backward(
            do, q, k, v, o, lse_BhR, None, None, rows, keys, 0.0, causal, none, none, scale=scale
        )
        return found[0][..., :D], found[1][..., :D], found[2][..., :E]
    dq, dk, dv = q.new_empty(q.shape), None, None
    wide = torch.promote_types(q.dtype, torch.float32)
    for *part, dq_part in zip(*(_by_kv_head(x, k.shape[1], causal) for x in (do, q, o, lse_BhR, dq)), strict=True):
        do, q, o, lse = part
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse, 0.0, causal, scale=scale
        )
        dq_part.copy_(found[0])
        dk = found[1].to(wide) if dk is None else dk.add_(found[1])
        dv = found[2].to(wide) if dv is None else dv.add_(found[2])
    return dq[..., :D], dk[..., :D], dv[..., :E]


def _equal_heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Pad the head dims to the largest, and on CUDA to a multiple of 8; zeros change no score and no output."""
    most = max(x.shape[-1] for x in tensors)
    most = most if tensors[0].device.type == "cpu" else -(-most // 8) * 8
    return [x if x.shape[-1] == most else F.pad(x, (0, most - x.shape[-1])) for x in tensors]


def _by_kv_head(x_Bh: torch.Tensor, num_kv_heads: int, causal: bool) -> list[torch.Tensor]:
    """Split query heads for CPU's kernel, which has no head groups: ``[B, h, R, ...]`` to parts of ``[B, k, ...]``.

    Without a triangle the rows of all heads of a KV head are one part; with one there is a part per head of the group.
    """
    grouped = x_Bh.unflatten(1, (num_kv_heads, -1))
    return list(grouped.unbind(2)) if causal else [grouped.flatten(2, 3)]

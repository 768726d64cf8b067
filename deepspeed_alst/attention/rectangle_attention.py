"""Exact attention of some query rows to the keys and values of a whole sequence, rectangle by rectangle.

Outputs are summed in fp32 and rounded once, weighted by the log-sum-exp of each rectangle's scores; the backward of a
rectangle uses the log-sum-exp of all (FlashAttention, arXiv:2205.14135, section 3.1). A sink is a score without a
value, one per query head.

Legend: B batch, h query heads, k KV heads, R rows, N keys of a rectangle, S whole sequence, D head dim of q and k, E of
v.
"""

from collections.abc import Iterable, Sequence

import torch

from deepspeed_alst.attention.attention_kernels import Kernel
from deepspeed_alst.attention.rectangles import Rectangle


def attend(
    q_BhRD: torch.Tensor,
    k_BkSD: torch.Tensor,
    v_BkSE: torch.Tensor,
    parts: Iterable[Rectangle],
    first_row: int,
    kernel: Kernel,
    sinks_h: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output ``[B, h, R, E]`` and log-sum-exp ``[B, h, R]``, at least fp32, of rows from ``first_row`` on."""
    o_BhRE, lse_BhR = without_keys(q_BhRD, v_BkSE.shape[3], sinks_h)
    add_attention(o_BhRE, lse_BhR, q_BhRD, (k_BkSD, v_BkSE), parts, (first_row, 0), kernel)
    return o_BhRE.to(q_BhRD.dtype), lse_BhR


def without_keys(
    q_Bh: torch.Tensor, value_dim: int, sinks_h: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output ``[B, h, ..., E]`` and log-sum-exp ``[B, h, ...]`` of queries that have seen no keys, in fp32."""
    wide = torch.promote_types(q_Bh.dtype, torch.float32)
    lse_Bh = q_Bh.new_full(q_Bh.shape[:-1], -torch.inf, dtype=wide)
    if sinks_h is not None:
        lse_Bh.copy_(sinks_h.view(-1, *[1] * (lse_Bh.dim() - 2)))
    return q_Bh.new_zeros(*q_Bh.shape[:-1], value_dim, dtype=wide), lse_Bh


def add_attention(
    o_BhRE: torch.Tensor,
    lse_BhR: torch.Tensor,
    q_BhRD: torch.Tensor,
    keys_values: Sequence[torch.Tensor],
    parts: Iterable[Rectangle],
    first: tuple[int, int],
    kernel: Kernel,
) -> None:
    """Add the rectangles' keys to output and log-sum-exp; ``first`` are the first row and the first key given."""
    wide = o_BhRE.dtype
    for part in kernel.cut(parts, q_BhRD.shape[1]):
        rows, keys = _slices(part, *first)
        q, (k, v) = q_BhRD[:, :, rows], (x[:, :, keys] for x in keys_values)
        if part.triangle == "upper":
            q, k, v = q.flip(2), k.flip(2), v.flip(2)
        o, lse = kernel.forward(q, k, v, part)
        if part.triangle == "upper":
            o, lse = o.flip(2), lse.flip(2)
        before, lse = lse_BhR[:, :, rows], lse.to(wide)
        after = torch.logaddexp(before, lse)
        kept, added = (before - after).exp_()[..., None], (lse - after).exp_()[..., None]
        o_BhRE[:, :, rows] = (o_BhRE[:, :, rows] * kept).addcmul_(o.to(wide), added)
        lse_BhR[:, :, rows] = after


def add_gradients(
    dq_BhRD: torch.Tensor,
    dk_BkND: torch.Tensor,
    dv_BkNE: torch.Tensor,
    of_queries: Sequence[torch.Tensor],
    keys_values: Sequence[torch.Tensor],
    parts: Iterable[Rectangle],
    first: tuple[int, int],
    kernel: Kernel,
) -> None:
    """Add the gradients of q, k and v to sums that are at least fp32.

    ``of_queries`` are the output's gradient, q, the output and the log-sum-exp of all keys; ``first`` are the first row
    and the first key given.
    """
    for part in kernel.cut(parts, dq_BhRD.shape[1]):
        rows, keys = _slices(part, *first)
        of_rows = [x[:, :, rows] for x in of_queries]
        of_keys = [x[:, :, keys] for x in keys_values]
        if part.triangle == "upper":
            of_rows, of_keys = [x.flip(2) for x in of_rows], [x.flip(2) for x in of_keys]
        (do, q, o, lse), (k, v) = of_rows, of_keys
        dq, dk, dv = kernel.backward(do, q, k, v, o, lse, part)
        if part.triangle == "upper":
            dq, dk, dv = dq.flip(2), dk.flip(2), dv.flip(2)
        dq_BhRD[:, :, rows] += dq
        dk_BkND[:, :, keys] += dk
        dv_BkNE[:, :, keys] += dv


def sinks_gradient(
    do_Bhe: torch.Tensor, o_Bhe: torch.Tensor, lse_Bh: torch.Tensor, sinks_h: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of sinks ``[h]`` from that of the output, ``[B, h, ..., E]``, of any rows."""
    delta_Bh = torch.linalg.vecdot(do_Bhe.to(lse_Bh.dtype), o_Bhe.to(lse_Bh.dtype))
    weights_Bh = (sinks_h.view(-1, *[1] * (lse_Bh.dim() - 2)) - lse_Bh).exp_()
    return -(weights_Bh * delta_Bh).transpose(0, 1).flatten(1).sum(1)


def _slices(part: Rectangle, first_row: int, first_key: int) -> tuple[slice, slice]:
    rows = slice(part.first_row - first_row, part.last_row - first_row)
    return rows, slice(part.first_key - first_key, part.last_key - first_key)

"""Attention over a sequence that is split over ranks: one all-to-all in, the core on whole sequences, one out.

q, k and v travel in one buffer, so a layer makes two collectives in forward, two in the recomputation and two in
backward. Ulysses, arXiv:2309.14509.

Legend: B batch, S whole sequence, H query heads, K kv heads, D head dim, P ranks; lower case = this rank's share
(s = S/P, h = H/P, k = kv heads per rank); W = h*D + 2*k*D, what one token sends to one rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.attention.heads import HeadPlan

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def ulysses_attention(
    q_BHsD: torch.Tensor,
    k_BKsD: torch.Tensor,
    v_BKsD: torch.Tensor,
    group: Any,
    core: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Attend over the whole sequence: ``[B, H, s, D], 2 x [B, K, s, D] -> [B, s, H, D]``.

    ``core`` gets ``[B, h, S, D]`` and twice ``[B, k, S, D]`` and returns ``[B, h, S, D]``. Head size of v may differ.

    Raises:
        ShapeError: the ranks cannot split these heads.
    """
    plan = HeadPlan(dist.get_world_size(group), q_BHsD.shape[1], k_BKsD.shape[1])
    q_BhSD, k_BkSD, v_BkSD = _SeqToHead.apply(q_BHsD, k_BKsD, v_BKsD, plan, group)
    return _HeadToSeq.apply(core(q_BhSD, k_BkSD, v_BkSD), group)


class _SeqToHead(torch.autograd.Function):
    """Sequence shards of all heads in, head shards of the whole sequence out."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HeadPlan, group: Any) -> Triple:
        ctx.plan, ctx.group = plan, group
        return _unpack_heads(_exchange(_pack_heads(q, k, v, plan), group), _widths(q, k, v, plan))

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        P = ctx.plan.sp_size
        grads_BhSD = (dq, dk, dv)
        send_PsBW = torch.cat([_by_token(g).flatten(2) for g in grads_BhSD], dim=-1).unflatten(0, (P, -1))
        recv_PsBW = _exchange(send_PsBW, ctx.group)
        grads_BHsD = []
        first = 0
        for index, g in enumerate(grads_BhSD):
            heads, D = g.shape[1], g.shape[3]
            part_PsBhD = recv_PsBW[..., first : first + heads * D].unflatten(-1, (heads, D))
            first += heads * D
            if index and ctx.plan.kv_replicas > 1:
                # Every rank that held a copy of a kv head has a share of its gradient; added in fp32, rounded once.
                copies = part_PsBhD.unflatten(0, (-1, ctx.plan.kv_replicas))
                part_PsBhD = copies.sum(1, dtype=_sum_dtype(g)).to(g.dtype)
            grads_BHsD.append(part_PsBhD.permute(2, 0, 3, 1, 4).flatten(1, 2))
        return (*grads_BHsD, None, None)


class _HeadToSeq(torch.autograd.Function):
    """Head shards of the whole sequence in, ``[B, h, S, D]``; sequence shards of all heads out, ``[B, s, H, D]``."""

    @staticmethod
    def forward(ctx: Any, o_BhSD: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        P = dist.get_world_size(group)
        recv_PsBhD = _exchange(_by_token(o_BhSD).unflatten(0, (P, -1)), group)
        return recv_PsBhD.permute(2, 1, 0, 3, 4).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor, None]:
        P = dist.get_world_size(ctx.group)
        send_PsBhD = do_BsHD.unflatten(2, (P, -1)).permute(2, 1, 0, 3, 4)
        return _exchange(send_PsBhD, ctx.group).flatten(0, 1).permute(1, 2, 0, 3), None


def _exchange(send: torch.Tensor, group: Any) -> torch.Tensor:
    """Piece p of dim 0 goes to rank p; piece p of the result came from rank p."""
    send = send.contiguous()
    recv = torch.empty_like(send)
    dist.all_to_all_single(recv, send, group=group)
    return recv


def _by_token(x_BhSD: torch.Tensor) -> torch.Tensor:
    """``[B, h, S, D] -> [S, B, h, D]``, a view."""
    return x_BhSD.permute(2, 0, 1, 3)


def _sum_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widths(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HeadPlan) -> list[tuple[int, int]]:
    h, kv = plan.heads_per_rank, plan.kv_heads_per_rank
    return [(h, q.shape[3]), (kv, k.shape[3]), (kv, v.shape[3])]


def _pack_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HeadPlan) -> torch.Tensor:
    """One buffer ``[P, s, B, W]``, each element written once: what each rank gets of q, then of k, then of v."""
    B, _, s, _ = q.shape
    P, m = plan.sp_size, plan.kv_replicas
    widths = _widths(q, k, v, plan)
    send_PsBW = q.new_empty(P, s, B, sum(heads * D for heads, D in widths))
    first = 0
    for x_BHsD, (heads, D) in zip((q, k, v), widths, strict=True):
        part_PsBhD = send_PsBW[..., first : first + heads * D].unflatten(-1, (heads, D))
        first += heads * D
        copies = m if x_BHsD is not q else 1
        # [B, H, s, D] -> [P/copies, 1, s, B, h, D]; the 1 is broadcast over the ranks that hold the same head.
        pieces = x_BHsD.unflatten(1, (P // copies, heads)).permute(1, 3, 0, 2, 4).unsqueeze(1)
        part_PsBhD.unflatten(0, (P // copies, copies)).copy_(pieces)
    return send_PsBW


def _unpack_heads(recv_PsBW: torch.Tensor, widths: list[tuple[int, int]]) -> Triple:
    """``[P, s, B, W]`` is ``[S, B, W]``: q, k and v of the whole sequence are views of it, nothing is copied."""
    recv_SBW = recv_PsBW.flatten(0, 1)
    q, k, v = (
        part_SBW.unflatten(-1, width).permute(1, 2, 0, 3)
        for part_SBW, width in zip(recv_SBW.split([h * D for h, D in widths], dim=-1), widths, strict=True)
    )
    return q, k, v

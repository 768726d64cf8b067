"""Attention over a sequence that is split over ranks: one all-to-all in, the core on whole sequences, one out.

q, k and v travel in one buffer, so a layer makes two collectives in forward, two in the recomputation and two in
backward. Where attention's output is kept the recomputation makes one: the output waits as the sequence shard that the
layer goes on with, and attention's backward gets it with the gradient. Ulysses, arXiv:2309.14509.

Legend: B batch, S whole sequence, H query heads, K kv heads, D head dim, P ranks; lower case = this rank's share
(s = S/P, h = H/P, k = kv heads per rank); W = h*D + 2*k*D, what one token sends to one rank.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.attention.heads import HeadPlan
from deepspeed_alst.attention.kept import Ran, record, replayed
from deepspeed_alst.offload.frames import Frame

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def ulysses_attention(
    q_BHsD: torch.Tensor,
    k_BKsD: torch.Tensor,
    v_BKsD: torch.Tensor,
    group: Any,
    core: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    frame: Frame | None = None,
) -> torch.Tensor:
    """Attend over the whole sequence: ``[B, H, s, D], 2 x [B, K, s, D] -> [B, s, H, D]``.

    ``core`` gets ``[B, h, S, D]`` and twice ``[B, k, S, D]`` and returns ``[B, h, S, D]``. Head size of v may differ.
    With a ``frame`` its output is kept for the recomputation.

    Raises:
        ShapeError: the ranks cannot split these heads.
    """
    plan = HeadPlan(dist.get_world_size(group), q_BHsD.shape[1], k_BKsD.shape[1])
    q_BhSD, k_BkSD, v_BkSD = _SeqToHead.apply(q_BHsD, k_BKsD, v_BKsD, plan, group)
    run = partial(core, q_BhSD, k_BkSD, v_BkSD)
    return _HeadToSeq.apply(run(), group) if frame is None else _attend_once(frame, run, group)


def _attend_once(frame: Frame, run: Callable[[], torch.Tensor], group: Any) -> torch.Tensor:
    """The core and the way back of its output, ``[B, s, H, D]``, which is kept or taken instead."""
    if frame.recomputing:
        return _attend_again(frame, run, group)
    o_BhSD, seen = record(frame, run)
    as_shard = len(seen.ran) == 1 and _is_all_of(o_BhSD, seen.ran[0].outputs[0])
    flat = [x for ran in seen.ran for x in ran.lay_flat()]
    if not as_shard:
        frame.keep(*flat, note=(seen.ran, as_shard))
        return _HeadToSeq.apply(o_BhSD, group)
    o_BsHD = _HeadToSeqKept.apply(o_BhSD, None, group)
    frame.keep(o_BsHD, flat[1], note=(seen.ran, as_shard))
    return o_BsHD


def _attend_again(frame: Frame, run: Callable[[], torch.Tensor], group: Any) -> torch.Tensor:
    ran: list[Ran]
    ran, as_shard = frame.note()
    kept = frame.take()
    if not as_shard:
        with replayed(ran, [each.raise_up(kept[2 * i : 2 * i + 2]) for i, each in enumerate(ran)]):
            o_BhSD = run()
        return _HeadToSeq.apply(o_BhSD, group)
    o_BsHD, log_sum_exp = kept
    empty = ran[0].empty_output(like=o_BsHD)
    with replayed(ran, [ran[0].raise_up([empty, log_sum_exp])]):
        o_BhSD = run()
    # No memory until its values come: autograd holds it by the storage.
    empty.untyped_storage().resize_(0)
    return _HeadToSeqKept.apply(o_BhSD, o_BsHD, group)


def _is_all_of(x: torch.Tensor, of: torch.Tensor) -> bool:
    """Whether x is another view of all elements of a tensor that has its memory for itself."""
    memory = of.untyped_storage()
    is_alone = memory.nbytes() == of.numel() * of.element_size()
    return is_alone and x.untyped_storage()._cdata == memory._cdata and x.numel() == of.numel() and x.dtype == of.dtype


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


class _HeadToSeqKept(torch.autograd.Function):
    """``_HeadToSeq`` whose output, ``[B, s, H, D]``, is there already in the recomputation.

    What it has instead of an input, ``[B, h, S, D]``, has no memory then. The backward fetches the values together with
    the gradient, before attention's backward, which holds the same storage, reads them.
    """

    @staticmethod
    def forward(ctx: Any, o_BhSD: torch.Tensor, o_BsHD: torch.Tensor | None, group: Any) -> torch.Tensor:
        ctx.group = group
        # In the recomputation as well, where nothing is sent: a checkpoint counts what is saved.
        o_BsHD = _HeadToSeq.forward(ctx, o_BhSD, group) if o_BsHD is None else o_BsHD.detach()
        ctx.save_for_backward(o_BhSD, o_BsHD)
        return o_BsHD

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Of a checkpoint that is not reentrant these are the recomputation's, and reading them runs it if need be.
        o_BhSD, o_BsHD = ctx.saved_tensors
        storage = o_BhSD.untyped_storage()
        if storage.nbytes():
            return *_HeadToSeq.backward(ctx, do_BsHD), None
        B, h, S, D = o_BhSD.shape
        P = dist.get_world_size(ctx.group)
        send_P2sBhD = do_BsHD.new_empty(P, 2, S // P, B, h, D)
        for index, x_BsHD in enumerate((do_BsHD, o_BsHD)):
            send_P2sBhD[:, index].copy_(x_BsHD.unflatten(2, (P, -1)).permute(2, 1, 0, 3, 4))
        recv_P2sBhD = _exchange(send_P2sBhD, ctx.group)
        storage.resize_(o_BhSD.numel() * o_BhSD.element_size())
        # It was saved empty, and is to count as unchanged.
        with torch.autograd._unsafe_preserve_version_counter(o_BhSD):
            _by_token(o_BhSD.detach()).unflatten(0, (P, -1)).copy_(recv_P2sBhD[:, 1])
        # A copy: the gradient lives until attention's backward ends, and is not to hold the other half meanwhile.
        return recv_P2sBhD[:, 0].flatten(0, 1).permute(1, 2, 0, 3), None, None


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

"""Ulysses attention (arXiv:2309.14509): all-to-all in, the core on whole sequences, all-to-all out.

q, k and v share one buffer: two collectives in each pass, one in the recomputation if the output is saved.
Ranks may hold unequal heads (head_plan.py), which are sent in pieces of unequal sizes.

Legend: B batch, S whole sequence, H query heads, K KV heads, D head dim, P ranks; lower case = local share (s = S/P, h
and k heads of this rank); W = h*D + 2*k*D, the elements of one token for one rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.distributed.collectives import count_sent
from deepspeed_alst.kernels.head_layout import (
    by_heads,
    by_tokens,
    pack,
    pack_uneven,
    uneven_sizes,
    unpack_,
    unpack_uneven_,
)
from deepspeed_alst.sequence_parallel.head_plan import HeadPlan

Tensors = tuple[torch.Tensor, ...]


def ulysses_attention(
    q_BHsD: torch.Tensor,
    k_BKsD: torch.Tensor,
    v_BKsD: torch.Tensor,
    group: Any,
    core: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    frame: Any = None,
) -> torch.Tensor:
    """Attend over the whole sequence: ``[B, H, s, D], 2 x [B, K, s, D] -> [B, s, H, D]``.

    ``core`` gets ``[B, h, S, D]`` and twice ``[B, k, S, D]`` and returns ``[B, h, S, D]``; k divides h. Head size of v
    may differ. With a ``frame`` (offload/attention_cache.py) its output is saved for the recomputation.

    Raises:
        ShapeError: these heads cannot be split over the ranks.
    """
    plan = HeadPlan(dist.get_world_size(group), q_BHsD.shape[1], k_BKsD.shape[1])
    q_BhSD, *keys_values = _SeqToHead.apply(q_BHsD, k_BKsD, v_BKsD, plan, group)  # type: ignore[no-untyped-call]
    copies = plan.kv_copies_of(dist.get_rank(group))
    run = partial(core, q_BhSD, *(repeat_heads(x, copies) for x in keys_values))
    if frame is None:
        return HeadToSeq.apply(run(), plan, group)  # type: ignore[no-untyped-call]
    from deepspeed_alst.sequence_parallel.cached_ulysses import attend_cached

    return attend_cached(frame, run, plan, group)


class _SeqToHead(torch.autograd.Function):
    """All-to-all from sequence shards of all heads to head shards of the whole sequence."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HeadPlan, group: Any
    ) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.group = plan, group
        return _whole_sequences(to_heads((q, k, v), plan, group), own_shapes((q, k, v), plan, group))

    @staticmethod
    def backward(ctx: Any, *grads_BhSD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        pieces = [by_tokens(g, plan.sp_size) for g in grads_BhSD]
        # Memory layout of projection outputs: the backward of their transposition copies nothing.
        grads_BsHD = to_tokens(pieces, (plan.num_heads, plan.num_kv_heads, plan.num_kv_heads), plan, ctx.group)
        return (*(g.transpose(1, 2) for g in grads_BsHD), None, None)


class HeadToSeq(torch.autograd.Function):
    """All-to-all from head shards of the whole sequence, ``[B, h, S, D]``, to sequence shards, ``[B, s, H, D]``."""

    @staticmethod
    def forward(ctx: Any, o_BhSD: torch.Tensor, plan: HeadPlan, group: Any) -> torch.Tensor:
        """Exchange the output."""
        ctx.plan, ctx.group = plan, group
        (o_BsHD,) = to_tokens([by_tokens(o_BhSD, plan.sp_size)], [plan.num_heads], plan, group)
        return o_BsHD

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Exchange its gradient."""
        do_BHsD = do_BsHD.transpose(1, 2)
        recv_PsBW = to_heads([do_BHsD], ctx.plan, ctx.group)
        (do_BhSD,) = _whole_sequences(recv_PsBW, own_shapes([do_BHsD], ctx.plan, ctx.group))
        return do_BhSD, None, None


def exchange(
    send: torch.Tensor, group: Any, to_ranks: list[int] | None = None, from_ranks: list[int] | None = None
) -> torch.Tensor:
    """Run an all-to-all: piece p of dim 0 goes to rank p, and piece p of the result comes from rank p.

    Pieces are equal unless ``to_ranks`` and ``from_ranks`` give their sizes.
    """
    recv = torch.empty_like(send) if from_ranks is None else send.new_empty(sum(from_ranks), *send.shape[1:])
    dist.all_to_all_single(recv, send, from_ranks, to_ranks, group=group)
    own = send.shape[0] // dist.get_world_size(group) if to_ranks is None else to_ranks[dist.get_rank(group)]
    count_sent(group, send.nbytes - send[:own].nbytes)
    return recv


def to_heads(tensors_BHsD: Sequence[torch.Tensor], plan: HeadPlan, group: Any) -> torch.Tensor:
    """Exchange shards of all query or KV heads for this rank's heads of all shards: ``[B, H, s, D] -> [P, s, B, W]``.

    The buffer has the heads of the first tensor, then of the next: ``own_shapes``. Collective: one all-to-all.
    """
    P = plan.sp_size
    if plan.is_even:
        return exchange(pack([by_heads(x, min(P, x.shape[1])) for x in tensors_BHsD], P), group)
    B, _, s, _ = tensors_BHsD[0].shape
    send_n, to_ranks = pack_uneven(tensors_BHsD, [plan.split(x.shape[1]) for x in tensors_BHsD])
    from_ranks = [to_ranks[dist.get_rank(group)]] * P
    return exchange(send_n, group, to_ranks, from_ranks).view(P, s, B, -1)


def to_tokens(
    pieces_PsBhD: Sequence[torch.Tensor], num_heads: Sequence[int], plan: HeadPlan, group: Any
) -> list[torch.Tensor]:
    """Reverse ``to_heads``: ``[P, s, B, h, D] -> [B, s, H, D]``; gradients of a KV head on several ranks are summed.

    ``num_heads`` are all heads of each tensor, query or KV. Collective: one all-to-all.
    """
    P, (_, s, B), head_dims = plan.sp_size, pieces_PsBhD[0].shape[:3], [x.shape[4] for x in pieces_PsBhD]
    if plan.is_even:
        recv = exchange(pack(pieces_PsBhD, P), group)
    else:
        splits = [plan.split(number) for number in num_heads]
        from_ranks = uneven_sizes(s * B, head_dims, splits)
        to_ranks = [from_ranks[dist.get_rank(group)]] * P
        recv = exchange(pack(pieces_PsBhD, P).flatten(), group, to_ranks, from_ranks)
    results_BsHD = [recv.new_empty(B, s, H, D) for H, D in zip(num_heads, head_dims, strict=True)]
    results_BHsD = [x.transpose(1, 2) for x in results_BsHD]
    if plan.is_even:
        unpack_(recv, [by_heads(x, min(P, x.shape[1])) for x in results_BHsD])
    else:
        unpack_uneven_(recv, results_BHsD, splits)
    return results_BsHD


def own_shapes(tensors_BHsD: Sequence[torch.Tensor], plan: HeadPlan, group: Any) -> list[tuple[int, int]]:
    """Return h and D of this rank's part of each tensor."""
    rank = dist.get_rank(group)
    return [(len(plan.split(x.shape[1])[rank]), x.shape[3]) for x in tensors_BHsD]


def _whole_sequences(recv_PsBW: torch.Tensor, shapes: list[tuple[int, int]]) -> Tensors:
    """Return views of the tensors in ``[P, s, B, W]``, which is ``[S, B, W]``: ``[B, h, S, D]`` each, without a copy.

    Attention accepts these strides: sdpa, flash attention and flex only need D to be contiguous.
    """
    recv_SBW = recv_PsBW.flatten(0, 1)
    return tuple(
        part_SBW.unflatten(-1, shape).permute(1, 2, 0, 3)  # type: ignore[no-untyped-call]
        for part_SBW, shape in zip(torch.split(recv_SBW, [h * D for h, D in shapes], dim=-1), shapes, strict=True)
    )


def repeat_heads(x_Bk: torch.Tensor, copies: Sequence[int]) -> torch.Tensor:
    """Repeat each KV head ``[B, k, ...]`` as often as ``HeadPlan.kv_copies_of`` says; no copy if all are once."""
    if all(number == 1 for number in copies):
        return x_Bk
    heads = zip(x_Bk.split(1, dim=1), copies, strict=True)  # type: ignore[no-untyped-call]
    # The backward of expand sums in fp32 and rounds once.
    return torch.cat([head.expand(-1, number, *x_Bk.shape[2:]) for head, number in heads], dim=1)


def sum_copies(x_Bk: torch.Tensor, copies: Sequence[int]) -> torch.Tensor:
    """Sum the gradients of what ``repeat_heads`` has repeated."""
    if all(number == 1 for number in copies):
        return x_Bk
    heads = x_Bk.split(list(copies), dim=1)  # type: ignore[no-untyped-call]
    return torch.cat([head.sum(1, keepdim=True) for head in heads], dim=1)

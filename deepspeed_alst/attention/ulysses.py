"""Ulysses attention (arXiv:2309.14509): all-to-all in, the core on whole sequences, all-to-all out.

q, k and v share one buffer: two collectives in each pass, one in the recomputation if the output is saved.
Ranks may hold unequal heads, or a part of the query rows (head_plan.py), which are sent in pieces of unequal sizes.
Where several nodes share a sequence, ranks of a node get a part of the rows of a KV head that all of them need, and
gather it among themselves: a third collective of a pass, on the fast links.

Legend: B batch, S whole sequence, H query heads, K KV heads, D head dim, P ranks; lower case = local share (s = S/P, h
and k heads of this rank); W = h*D + 2*k*D, the elements of one token for one rank; g ranks of a node that share KV
heads, m = s/g rows of a shard on each of them, rounded up or down.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.distributed.collectives import count_sent
from deepspeed_alst.kernels.head_layout import (
    Share,
    blocks,
    by_heads,
    by_tokens,
    pack,
    pack_uneven,
    uneven_sizes,
    unpack_,
    unpack_uneven_,
)


def ulysses_attention(
    q_BHsD: torch.Tensor,
    k_BKsD: torch.Tensor,
    v_BKsD: torch.Tensor,
    group: Any,
    core: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    frame: Any = None,
    plan: HeadPlan | None = None,
    kv_group: Any = None,
) -> torch.Tensor:
    """Attend over the whole sequence: ``[B, H, s, D], 2 x [B, K, s, D] -> [B, s, H, D]``.

    ``core`` gets ``[B, h, S, D]`` and twice ``[B, k, S, D]`` and returns ``[B, h, S, D]``; k divides h. Head size of v
    may differ. With more ranks than heads its queries and output have ``HeadPlan.rows`` alone. With a ``frame``
    (attention_cache.py) its output is saved for the recomputation. ``kv_group`` are the ``kv_parts`` ranks of a
    ``plan`` with a node size.

    Raises:
        ShapeError: these heads cannot be split over the ranks.
    """
    plan = plan or HeadPlan(dist.get_world_size(group), q_BHsD.shape[1], k_BKsD.shape[1])
    s, groups = q_BHsD.shape[2], (group, kv_group)
    q_BhSD, *keys_values = _SeqToHead.apply(q_BHsD, k_BKsD, v_BKsD, plan, *groups)  # type: ignore[no-untyped-call]
    copies = plan.kv_copies_of(dist.get_rank(group))
    run = partial(core, q_BhSD, *(repeat_heads(x, copies) for x in keys_values))
    if frame is None:
        return HeadToSeq.apply(run(), s, plan, group)  # type: ignore[no-untyped-call]
    from deepspeed_alst.attention.cached_ulysses import attend_cached

    return attend_cached(frame, run, s, plan, group)


class _SeqToHead(torch.autograd.Function):
    """All-to-all from sequence shards of all heads to head shards of the whole sequence."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HeadPlan, group: Any, kv_group: Any
    ) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.group, ctx.kv_group, ctx.num_tokens = plan, group, kv_group, q.shape[2]
        q, *keys_values = to_heads((q, k, v), "qkv", plan, group)
        if plan.kv_parts > 1:
            keys_values = _gather_rows(keys_values, ctx.num_tokens, group, kv_group)
        return tuple(whole_sequence(x) for x in (q, *keys_values))

    @staticmethod
    def backward(ctx: Any, *grads_BhSD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pieces = [by_tokens(g, ctx.plan.sp_size) for g in grads_BhSD]
        if ctx.plan.kv_parts > 1:
            pieces[1:] = _sum_rows(pieces[1:], ctx.group, ctx.kv_group)
        # Memory layout of projection outputs: the backward of their transposition copies nothing.
        grads_BsHD = to_tokens(pieces, "qkv", ctx.num_tokens, ctx.plan, ctx.group)
        return (*(g.transpose(1, 2) for g in grads_BsHD), None, None, None)


class HeadToSeq(torch.autograd.Function):
    """All-to-all from head shards of the whole sequence, ``[B, h, S, D]``, to shards of s tokens, ``[B, s, H, D]``."""

    @staticmethod
    def forward(ctx: Any, o_BhSD: torch.Tensor, num_tokens: int, plan: HeadPlan, group: Any) -> torch.Tensor:
        """Exchange the output."""
        ctx.plan, ctx.group = plan, group
        (o_BsHD,) = to_tokens([by_tokens(o_BhSD, plan.sp_size)], "q", num_tokens, plan, group)
        return o_BsHD

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Exchange its gradient."""
        (do_PsBhD,) = to_heads([do_BsHD.transpose(1, 2)], "q", ctx.plan, ctx.group)
        return whole_sequence(do_PsBhD), None, None, None


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


def to_heads(tensors_BHsD: Sequence[torch.Tensor], kinds: str, plan: HeadPlan, group: Any) -> list[torch.Tensor]:
    """Exchange shards of all heads for this rank's heads of all shards: ``[B, H, s, D] -> [P, s, B, h, D]``, views.

    A tensor of kind "q", with query heads, comes with this rank's rows of each shard; one of kind "k" or "v" with all.
    Collective: one all-to-all.
    """
    own = _own_shares(kinds, tensors_BHsD[0].shape[2], plan, group)
    return _parts_of(to_blocks(tensors_BHsD, kinds, plan, group), [x.shape[3] for x in tensors_BHsD], own)


def to_blocks(tensors_BHsD: Sequence[torch.Tensor], kinds: str, plan: HeadPlan, group: Any) -> list[torch.Tensor]:
    """Run ``to_heads``, but return the blocks of its buffer, ``[P, s, B, W]``, of tensors with the same rows.

    A block has the heads of the first tensor, then of the next.
    """
    P, (B, _, s, _) = plan.sp_size, tensors_BHsD[0].shape
    if plan.is_even_for(kinds):
        return [exchange(pack([by_heads(x, min(P, x.shape[1])) for x in tensors_BHsD], P), group)]
    send_n, to_ranks = pack_uneven(tensors_BHsD, [plan.shares(kind, s) for kind in kinds])
    recv = exchange(send_n, group, to_ranks, [to_ranks[dist.get_rank(group)]] * P)
    return _blocks_of(recv, plan, B, [x.shape[3] for x in tensors_BHsD], _own_shares(kinds, s, plan, group))


def _blocks_of(
    buffer_n: torch.Tensor, plan: HeadPlan, batch_size: int, head_dims: Sequence[int], own: Sequence[Share]
) -> list[torch.Tensor]:
    """Return the blocks of a buffer of P pieces with this rank's shares: ``[P, s, B, W]`` each."""
    layout, P = blocks(head_dims, own), plan.sp_size
    parts = torch.split(buffer_n.view(P, -1), [batch_size * n * sum(widths) for n, widths in layout], dim=1)
    return [part.view(P, n, batch_size, sum(widths)) for part, (n, widths) in zip(parts, layout, strict=True)]


def _parts_of(
    blocks_PsBW: Sequence[torch.Tensor], head_dims: Sequence[int], own: Sequence[Share]
) -> list[torch.Tensor]:
    """Return the tensors in the blocks of a buffer: ``[P, s, B, h, D]`` each."""
    found = list[torch.Tensor]()
    for block_PsBW, (_, widths) in zip(blocks_PsBW, blocks(head_dims, own), strict=True):
        found += torch.split(block_PsBW, widths, dim=-1)
    pairs = zip(found, head_dims, strict=True)
    return [part.unflatten(-1, (-1, D)) for part, D in pairs]  # type: ignore[no-untyped-call]


def _own_shares(kinds: str, num_tokens: int, plan: HeadPlan, group: Any) -> list[Share]:
    rank = dist.get_rank(group)
    return [plan.shares(kind, num_tokens)[rank] for kind in kinds]


def to_tokens(
    pieces_PsBhD: Sequence[torch.Tensor], kinds: str, num_tokens: int, plan: HeadPlan, group: Any
) -> list[torch.Tensor]:
    """Reverse ``to_heads``: ``[P, s, B, h, D] -> [B, s, H, D]``; gradients of a KV head on several ranks are summed.

    ``num_tokens`` is s, those of a shard. Collective: one all-to-all.
    """
    P, B, head_dims = plan.sp_size, pieces_PsBhD[0].shape[2], [x.shape[4] for x in pieces_PsBhD]
    shares = [plan.shares(kind, num_tokens) for kind in kinds]
    if plan.is_even_for(kinds):
        recv = exchange(pack(pieces_PsBhD, P), group)
    else:
        from_ranks = uneven_sizes(B, head_dims, shares)
        to_ranks, own = [from_ranks[dist.get_rank(group)]] * P, _own_shares(kinds, num_tokens, plan, group)
        if len(blocks(head_dims, own)) == 1:
            send_n = pack(pieces_PsBhD, P).flatten()
        else:
            send_n = pieces_PsBhD[0].new_empty(sum(to_ranks))
            parts = _parts_of(_blocks_of(send_n, plan, B, head_dims, own), head_dims, own)
            for part_PsBhD, x_PsBhD in zip(parts, pieces_PsBhD, strict=True):
                part_PsBhD.copy_(x_PsBhD)
        recv = exchange(send_n, group, to_ranks, from_ranks)
        del send_n  # as large as whole keys and values where ranks share rows
    results_BsHD = [
        recv.new_empty(B, num_tokens, plan.num_heads if kind == "q" else plan.num_kv_heads, D)
        for kind, D in zip(kinds, head_dims, strict=True)
    ]
    results_BHsD = [x.transpose(1, 2) for x in results_BsHD]
    if plan.is_even_for(kinds):
        unpack_(recv, [by_heads(x, min(P, x.shape[1])) for x in results_BHsD])
    else:
        unpack_uneven_(recv, results_BHsD, shares)
    return results_BsHD


def _gather_rows(parts_PmBkD: Sequence[torch.Tensor], num_tokens: int, group: Any, kv_group: Any) -> list[torch.Tensor]:
    """Gather the rows that g ranks of a node have of K and V: ``[P, m, B, k, D] -> [P, s, B, k, D]``."""
    g, m = dist.get_world_size(kv_group), parts_PmBkD[0].shape[1]
    send_PmBkW = F.pad(torch.cat([*parts_PmBkD], -1), [0] * 7 + [-(-num_tokens // g) - m])
    recv = send_PmBkW.new_empty(g * len(send_PmBkW), *send_PmBkW.shape[1:])
    dist.all_gather_into_tensor(recv, send_PmBkW, group=kv_group)
    count_sent(group, (g - 1) * send_PmBkW.nbytes)
    whole_PsBkW = recv.view(g, -1, *recv.shape[1:]).transpose(0, 1).flatten(1, 2)[:, :num_tokens]
    return [*whole_PsBkW.split([x.shape[4] for x in parts_PmBkD], -1)]  # type: ignore[no-untyped-call]


def _sum_rows(grads_PsBkD: Sequence[torch.Tensor], group: Any, kv_group: Any) -> list[torch.Tensor]:
    """Reverse ``_gather_rows`` for gradients, which are summed in fp32 and rounded once."""
    g, s = dist.get_world_size(kv_group), grads_PsBkD[0].shape[1]
    padded = F.pad(torch.cat([*grads_PsBkD], -1), [0] * 7 + [-s % g])
    send_gPmBkW = torch.stack(padded.chunk(g, 1))
    recv_gPmBkW = torch.empty_like(send_gPmBkW)
    # Not a reduce-scatter, which sums in the dtype that it sends.
    dist.all_to_all_single(recv_gPmBkW, send_gPmBkW, group=kv_group)
    count_sent(group, send_gPmBkW.nbytes // g * (g - 1))
    first = dist.get_rank(kv_group) * recv_gPmBkW.shape[2]
    own_gPmBkW = recv_gPmBkW[:, :, : max(0, s - first)]
    total = own_gPmBkW.sum(0, dtype=torch.promote_types(own_gPmBkW.dtype, torch.float32)).to(own_gPmBkW.dtype)
    return [*total.split([x.shape[4] for x in grads_PsBkD], -1)]  # type: ignore[no-untyped-call]


def whole_sequence(x_PsBhD: torch.Tensor) -> torch.Tensor:
    """View all shards as a sequence: ``[P, s, B, h, D] -> [B, h, S, D]``; a copy where q has a part of the rows.

    Attention accepts these strides: sdpa, flash attention and flex only need D to be contiguous.
    """
    return x_PsBhD.flatten(0, 1).permute(1, 2, 0, 3)


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

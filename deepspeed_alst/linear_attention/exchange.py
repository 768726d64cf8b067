"""Collectives of layers without attention: an all-to-all by heads for scans, a halo of tokens for convolutions.

Unlike attention's (sequence_parallel/ulysses.py), the all-to-all takes any number of tensors of any dtypes.

Legend: B batch, S full sequence, H heads, D head dim, P ranks; lower case = this rank's share (s = S/P, h = heads of a
tensor on one rank); W = bytes of one token for one rank; n bytes of a buffer. For the halo: C channels, w = width, t =
w + s.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.kernels.head_layout import by_heads, by_tokens, merge_heads_
from deepspeed_alst.sequence_parallel.head_plan import HeadPlan
from deepspeed_alst.sequence_parallel.ulysses import exchange, repeat_heads

# In bytes: each tensor in a token's bytes is aligned for its dtype and for 16-byte loads.
_ALIGNMENT = 16
_Layout = list[tuple[int, int, torch.dtype]]
"""A rank's h, D and dtype of each tensor."""


def seq_to_head(tensors_BsHD: Sequence[torch.Tensor], plan: HeadPlan, group: Any) -> tuple[torch.Tensor, ...]:
    """Exchange sequence shards for head shards, per tensor: ``[B, s, H, D] -> [B, S, h, D]``, views of one buffer.

    D and dtype may differ, and H is the plan's number of heads or of head groups. The gradients of a group on several
    ranks are summed; groups are repeated where this rank has unequal numbers of their heads. Collective: one
    all-to-all, one in the backward.
    """
    full, copies = _SeqToHead.apply(plan, group, *tensors_BsHD), plan.kv_copies_of(dist.get_rank(group))
    return tuple(
        w_BShD if x_BsHD.shape[2] == plan.num_heads else repeat_heads(w_BShD.transpose(1, 2), copies).transpose(1, 2)
        for x_BsHD, w_BShD in zip(tensors_BsHD, full, strict=True)
    )


class _SeqToHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: HeadPlan, group: Any, *tensors_BsHD: torch.Tensor) -> tuple[Any, ...]:
        P, rank, (B, s) = plan.sp_size, dist.get_rank(group), tensors_BsHD[0].shape[:2]
        ctx.plan, ctx.group, ctx.num_heads = plan, group, [x.shape[2] for x in tensors_BsHD]
        ctx.layouts = _layouts(tensors_BsHD, plan)
        ctx.sizes = [s * B * _width(layout) for layout in ctx.layouts]
        send_n = tensors_BsHD[0].new_empty(sum(ctx.sizes), dtype=torch.uint8)
        if plan.is_even:
            send_PsBW = send_n.view(P, s, B, -1)
            for x_BsHD, part_PsBhD in zip(tensors_BsHD, _parts(send_PsBW, ctx.layouts[0]), strict=True):
                pieces = by_heads(x_BsHD.transpose(1, 2), min(P, x_BsHD.shape[2]))
                # Broadcast to the ranks that hold the same head.
                part_PsBhD.unflatten(0, (len(pieces), -1)).copy_(pieces.unsqueeze(1))
            recv_PsBW = exchange(send_PsBW, group)
        else:
            for x_BsHD, *parts_sBhD in zip(tensors_BsHD, *_parts_of_ranks(send_n, s, B, ctx), strict=True):
                for heads, part_sBhD in zip(plan.split(x_BsHD.shape[2]), parts_sBhD, strict=True):
                    part_sBhD.copy_(x_BsHD[:, :, heads.start : heads.stop].transpose(0, 1))
            recv_PsBW = exchange(send_n, group, ctx.sizes, [ctx.sizes[rank]] * P).view(P, s, B, -1)
        return tuple(x_PsBhD.flatten(0, 1).transpose(0, 1) for x_PsBhD in _parts(recv_PsBW, ctx.layouts[rank]))

    @staticmethod
    def backward(ctx: Any, *grads_BShD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        P, rank, (B, S) = ctx.plan.sp_size, dist.get_rank(ctx.group), grads_BShD[0].shape[:2]
        send_PsBW = grads_BShD[0].new_empty(P, S // P, B, _width(ctx.layouts[rank]), dtype=torch.uint8)
        for g_BShD, part_PsBhD in zip(grads_BShD, _parts(send_PsBW, ctx.layouts[rank]), strict=True):
            part_PsBhD.copy_(by_tokens(g_BShD.transpose(1, 2), P))
        grads_BsHD = []
        if ctx.plan.is_even:
            for H, part_PsBhD in zip(
                ctx.num_heads, _parts(exchange(send_PsBW, ctx.group), ctx.layouts[0]), strict=True
            ):
                if P > H:  # the gradients of a head's replicas are summed in fp32 and rounded once
                    dtype = torch.promote_types(part_PsBhD.dtype, torch.float32)
                    part_PsBhD = part_PsBhD.unflatten(0, (H, -1)).sum(1, dtype=dtype).to(part_PsBhD.dtype)
                grads_BsHD.append(part_PsBhD.permute(2, 1, 0, 3, 4).flatten(2, 3))
        else:
            recv_n = exchange(send_PsBW.flatten(), ctx.group, [ctx.sizes[rank]] * P, ctx.sizes)
            parts = zip(*_parts_of_ranks(recv_n, S // P, B, ctx), strict=True)
            for H, g_BShD, parts_sBhD in zip(ctx.num_heads, grads_BShD, parts, strict=True):
                grads_BsHD.append(g_BShD.new_empty(B, S // P, H, g_BShD.shape[3]))
                merge_heads_(grads_BsHD[-1].transpose(1, 2), ctx.plan.split(H), parts_sBhD)
        return None, None, *grads_BsHD


def _layouts(tensors_BsHD: Sequence[torch.Tensor], plan: HeadPlan) -> list[_Layout]:
    """Return the layout of each rank's piece."""
    splits = [plan.split(x.shape[2]) for x in tensors_BsHD]
    of_tensors = list(zip(tensors_BsHD, splits, strict=True))
    return [[(len(split[rank]), x.shape[3], x.dtype) for x, split in of_tensors] for rank in range(plan.sp_size)]


def _parts_of_ranks(buffer_n: torch.Tensor, s: int, B: int, ctx: Any) -> list[list[torch.Tensor]]:
    """Return views of a flat buffer with a piece per rank, by rank and tensor: ``[s, B, h, D]``."""
    pieces = zip(buffer_n.split(ctx.sizes), ctx.layouts, strict=True)
    return [_parts(piece_n.view(s, B, -1), layout) for piece_n, layout in pieces]


def _width(layout: _Layout) -> int:
    """Return W, the bytes of one token."""
    return sum(_aligned_bytes(*each) for each in layout)


def _parts(buffer_W: torch.Tensor, layout: _Layout) -> list[torch.Tensor]:
    """Return views of the tensors in a buffer ``[..., W]``: ``[..., h, D]`` each."""
    parts, first = [], 0
    for h, D, dtype in layout:
        part_w = buffer_W[..., first : first + h * D * dtype.itemsize]
        parts.append(part_w.view(dtype).unflatten(-1, (h, D)))
        first += _aligned_bytes(h, D, dtype)
    return parts


def _aligned_bytes(h: int, D: int, dtype: torch.dtype) -> int:
    return -(-h * D * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def prepend_halo(x_BCs: torch.Tensor, width: int, group: Any) -> torch.Tensor:
    """Prepend the ``width`` tokens before a shard: ``[B, C, s] -> [B, C, w + s]``, channels innermost in memory.

    Tokens before the sequence are 0. A shard shorter than the width gets tokens of several ranks. Collective: one
    all-to-all of ``width`` tokens per rank, and one in the backward.
    """
    return _PrependHalo.apply(x_BCs, width, group) if width else x_BCs


class _PrependHalo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCs: torch.Tensor, width: int, group: Any) -> torch.Tensor:
        P, rank = dist.get_world_size(group), dist.get_rank(group)
        B, C, s = x_BCs.shape
        ctx.group, ctx.width = group, width
        # Number of tokens that a rank sends to the rank at each distance after it.
        counts = [0, *(min(max(width - between * s, 0), s) for between in range(P - 1))]
        ctx.to_ranks = [counts[max(other - rank, 0)] for other in range(P)]
        ctx.from_ranks = [counts[max(rank - other, 0)] for other in range(P)]
        x_sBC = x_BCs.permute(2, 0, 1)
        send_nBC = torch.cat([x_sBC[s - tokens :] for tokens in ctx.to_ranks])
        before_nBC = exchange(send_nBC, group, ctx.to_ranks, ctx.from_ranks)
        x_tBC = x_BCs.new_empty(B, width + s, C).transpose(0, 1)
        missing = width - before_nBC.shape[0]
        x_tBC[:missing] = 0
        x_tBC[missing:width] = before_nBC
        x_tBC[width:] = x_sBC
        return x_tBC.permute(1, 2, 0)

    @staticmethod
    def backward(ctx: Any, g_BCt: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        g_tBC = g_BCt.permute(2, 0, 1)
        send_nBC = g_tBC[ctx.width - sum(ctx.from_ranks) : ctx.width].contiguous()
        recv_nBC = exchange(send_nBC, ctx.group, ctx.from_ranks, ctx.to_ranks)
        g_sBC = g_tBC[ctx.width :].clone()
        for piece in recv_nBC.split(ctx.to_ranks):
            g_sBC[g_sBC.shape[0] - piece.shape[0] :] += piece
        return g_sBC.permute(1, 2, 0), None, None

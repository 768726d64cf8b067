"""Collectives of layers without attention: an all-to-all by heads for scans, a halo of tokens for convolutions.

Unlike attention's (sequence_parallel/ulysses.py), the all-to-all takes any number of tensors of any dtypes.

Legend: B batch, S full sequence, H heads, D head dim, P ranks; lower case = this rank's share (s = S/P, h = heads of a
tensor on one rank); m = neighbouring ranks that hold the same head; W = bytes of one token for one rank. For the halo:
C channels, w = width, t = w + s.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.kernels.head_layout import by_heads, by_tokens
from deepspeed_alst.sequence_parallel.ulysses import exchange

# In bytes: each tensor in a token's bytes is aligned for its dtype and for 16-byte loads.
_ALIGNMENT = 16
_Layout = list[tuple[int, int, torch.dtype]]
"""h, D and dtype of each tensor."""


def seq_to_head(tensors_BsHD: Sequence[torch.Tensor], replicas: Sequence[int], group: Any) -> tuple[torch.Tensor, ...]:
    """Exchange sequence shards for head shards, per tensor: ``[B, s, H, D] -> [B, S, h, D]``, views of one buffer.

    H, D and dtype may differ. Rank r gets heads ``[r*h, (r+1)*h)``. If a tensor's ``replicas`` m exceed 1, H*m is P, m
    ranks get the same head, and their gradients are summed. Collective: one all-to-all, one in the backward.
    """
    return _SeqToHead.apply(tuple(replicas), group, *tensors_BsHD)


class _SeqToHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replicas: tuple[int, ...], group: Any, *tensors_BsHD: torch.Tensor) -> tuple[Any, ...]:
        P = dist.get_world_size(group)
        ctx.replicas, ctx.group = replicas, group
        ctx.layout = [(x.shape[2] * m // P, x.shape[3], x.dtype) for x, m in zip(tensors_BsHD, replicas, strict=True)]
        B, s = tensors_BsHD[0].shape[:2]
        send_PsBW = _buffer(tensors_BsHD[0], (P, s, B), ctx.layout)
        for x_BsHD, m, part_PsBhD in zip(tensors_BsHD, replicas, _parts(send_PsBW, ctx.layout), strict=True):
            pieces = by_heads(x_BsHD.transpose(1, 2), P // m)
            # Broadcast to the m ranks that hold the same head.
            part_PsBhD.unflatten(0, (P // m, m)).copy_(pieces.unsqueeze(1))
        received = _parts(exchange(send_PsBW, group), ctx.layout)
        return tuple(part_PsBhD.flatten(0, 1).transpose(0, 1) for part_PsBhD in received)

    @staticmethod
    def backward(ctx: Any, *grads_BShD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        P = dist.get_world_size(ctx.group)
        B, S = grads_BShD[0].shape[:2]
        send_PsBW = _buffer(grads_BShD[0], (P, S // P, B), ctx.layout)
        for g_BShD, part_PsBhD in zip(grads_BShD, _parts(send_PsBW, ctx.layout), strict=True):
            part_PsBhD.copy_(by_tokens(g_BShD.transpose(1, 2), P))
        grads_BsHD = []
        for m, part_PsBhD in zip(ctx.replicas, _parts(exchange(send_PsBW, ctx.group), ctx.layout), strict=True):
            if m > 1:  # the gradients of a head's replicas are summed in fp32 and rounded once
                dtype = torch.promote_types(part_PsBhD.dtype, torch.float32)
                part_PsBhD = part_PsBhD.unflatten(0, (-1, m)).sum(1, dtype=dtype).to(part_PsBhD.dtype)
            grads_BsHD.append(part_PsBhD.permute(2, 1, 0, 3, 4).flatten(2, 3))
        return None, None, *grads_BsHD


def _buffer(like: torch.Tensor, shape_PsB: tuple[int, int, int], layout: _Layout) -> torch.Tensor:
    """Allocate the send buffer: ``[P, s, B, W]`` bytes."""
    return like.new_empty(*shape_PsB, sum(_aligned_bytes(*each) for each in layout), dtype=torch.uint8)


def _parts(buffer_PsBW: torch.Tensor, layout: _Layout) -> list[torch.Tensor]:
    """Return views of a buffer's tensors, ``[P, s, B, h, D]`` each."""
    parts, first = [], 0
    for h, D, dtype in layout:
        own_PsBw = buffer_PsBW[..., first : first + h * D * dtype.itemsize]
        parts.append(own_PsBw.view(dtype).unflatten(-1, (h, D)))
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

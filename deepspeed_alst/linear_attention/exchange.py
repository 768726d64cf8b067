"""Collectives of layers without attention: attention's all-to-all by heads for scans, a halo for convolutions.

Legend: B batch, S full sequence, H heads, D head dim, P ranks; lower case = this rank's share (s = S/P, h = heads of a
tensor on one rank). For the halo: C channels, w = width, t = w + s.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.ulysses import exchange, repeat_heads, to_heads, to_tokens, whole_sequence
from deepspeed_alst.kernels.head_layout import by_tokens


def seq_to_head(tensors_BsHD: Sequence[torch.Tensor], plan: HeadPlan, group: Any) -> tuple[torch.Tensor, ...]:
    """Exchange sequence shards for head shards, per tensor: ``[B, s, H, D] -> [B, S, h, D]``.

    D and dtype may differ, and H is the plan's number of heads or of head groups. The gradients of a group on several
    ranks are summed; groups are repeated where this rank has unequal numbers of their heads. Collective: an all-to-all
    for each dtype (fp32 decays beside bf16), and one in the backward.
    """
    copies, found = plan.kv_copies_of(dist.get_rank(group)), {}
    for dtype in dict.fromkeys(x.dtype for x in tensors_BsHD):
        of_dtype = [x.transpose(1, 2) for x in tensors_BsHD if x.dtype == dtype]
        kinds = "".join("q" if x.shape[1] == plan.num_heads else "k" for x in of_dtype)
        full_BhSD = zip(_SeqToHead.apply(kinds, plan, group, *of_dtype), kinds, strict=True)
        found[dtype] = iter([w if kind == "q" else repeat_heads(w, copies) for w, kind in full_BhSD])
    return tuple(next(found[x.dtype]).transpose(1, 2) for x in tensors_BsHD)


class _SeqToHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kinds: str, plan: HeadPlan, group: Any, *tensors_BHsD: torch.Tensor) -> tuple[Any, ...]:
        ctx.sent = kinds, tensors_BHsD[0].shape[2], plan, group
        return tuple(map(whole_sequence, to_heads(tensors_BHsD, kinds, plan, group)))

    @staticmethod
    def backward(ctx: Any, *grads_BhSD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pieces = [by_tokens(g, ctx.sent[2].sp_size) for g in grads_BhSD]
        return None, None, None, *(g_BsHD.transpose(1, 2) for g_BsHD in to_tokens(pieces, *ctx.sent))


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

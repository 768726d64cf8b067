"""Exchange of the tokens before a shard, for convolutions that look a few tokens back.

Legend: B batch, C channels, s tokens of this rank's shard, P ranks; w = width, the tokens before the shard; t = w + s.
"""

from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.distributed.comm_volume import count_sent


def with_tokens_before(x_BCs: torch.Tensor, width: int, group: Any) -> torch.Tensor:
    """Prepend the ``width`` tokens before a shard: ``[B, C, s] -> [B, C, w + s]``, channels innermost in memory.

    Tokens before the sequence are 0. A shard shorter than the width gets tokens of several ranks. Collective over the
    group: one all-to-all of ``width`` tokens per rank, and one in the backward.
    """
    return _WithTokensBefore.apply(x_BCs, width, group) if width else x_BCs


def tokens_from(distance: int, width: int, length: int) -> int:
    """Return how many of its last tokens the rank ``distance`` before sends, out of the ``width`` tokens."""
    return min(max(width - (distance - 1) * length, 0), length)


class _WithTokensBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCs: torch.Tensor, width: int, group: Any) -> torch.Tensor:
        P, rank = dist.get_world_size(group), dist.get_rank(group)
        B, C, s = x_BCs.shape
        ctx.group, ctx.width = group, width
        ctx.to_ranks = [tokens_from(other - rank, width, s) if other > rank else 0 for other in range(P)]
        ctx.from_ranks = [tokens_from(rank - other, width, s) if other < rank else 0 for other in range(P)]
        x_sBC = x_BCs.permute(2, 0, 1)
        send_nBC = torch.cat([x_sBC[s - tokens :] for tokens in ctx.to_ranks])
        before_nBC = _exchange(send_nBC, ctx.to_ranks, ctx.from_ranks, group)
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
        recv_nBC = _exchange(send_nBC, ctx.from_ranks, ctx.to_ranks, ctx.group)
        g_sBC = g_tBC[ctx.width :].clone()
        for piece in recv_nBC.split(ctx.to_ranks):
            g_sBC[g_sBC.shape[0] - piece.shape[0] :] += piece
        return g_sBC.permute(1, 2, 0), None, None


def _exchange(send_nBC: torch.Tensor, to_ranks: list[int], from_ranks: list[int], group: Any) -> torch.Tensor:
    """Run an all-to-all of tokens along dim 0, with a count per rank."""
    recv_nBC = send_nBC.new_empty(sum(from_ranks), *send_nBC.shape[1:])
    dist.all_to_all_single(recv_nBC, send_nBC, from_ranks, to_ranks, group=group)
    count_sent(group, send_nBC.nbytes)  # a rank sends none to itself
    return recv_nBC

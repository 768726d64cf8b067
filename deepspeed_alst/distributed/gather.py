"""Gathers of what the ranks of a sequence have of its tokens.

Legend: B batch, S whole sequence, s = S/P one shard, P ranks of a sequence.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from deepspeed_alst.distributed.mesh import SequenceGroups

MAX_BYTES = 2 << 30
"""Bytes of one rank's predictions of one batch: fp32 logits of 4k tokens, vocabulary 128k, are 2 GiB."""


class _Gathered(torch.autograd.Function):
    """``[B, s] -> [B, S]``; the loss made of it is the same on all ranks, so its gradient is not exchanged."""

    @staticmethod
    def forward(ctx: Any, x_Bs: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.rank, ctx.ranks = dist.get_rank(group), dist.get_world_size(group)
        send = x_Bs.to(torch.uint8) if x_Bs.dtype == torch.bool else x_Bs.contiguous()
        shards = [torch.empty_like(send) for _ in range(ctx.ranks)]
        dist.all_gather(shards, send, group=group)
        return torch.cat(shards, dim=1).to(x_Bs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BS: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad_BS.chunk(ctx.ranks, dim=1)[ctx.rank] * ctx.ranks, None  # distributed/sequence_loss.py


def gather_tokens(x_Bs: torch.Tensor, group: Any) -> torch.Tensor:
    """Gather numbers of each token, ``[B, s] -> [B, S]``, with their gradient. Collective over the sequence's ranks."""
    return _Gathered.apply(x_Bs, group)


def gather_predictions(pieces: list[Any], length: int, groups: SequenceGroups) -> Any:
    """Gather the predictions of this rank's batch: ``P x [B_k, s_k, ...] -> [B, length, ...]``.

    Piece k is this rank's part of rank k's batch, a tensor or a tuple of tensors; ``length`` is that of this rank's
    batch before padding. Collective over the sequence's ranks.
    """
    if isinstance(pieces[0], tuple | list):
        columns = [gather_predictions(list(column), length, groups) for column in zip(*pieces, strict=True)]
        return type(pieces[0])(columns)
    own = pieces[groups.sp_rank]
    send = torch.cat([piece.flatten() for piece in pieces])
    recv = own.new_empty(groups.sp_size * own.numel())
    dist.all_to_all_single(
        recv, send, [own.numel()] * groups.sp_size, [piece.numel() for piece in pieces], group=groups.sp_group
    )
    return torch.cat(recv.view(groups.sp_size, *own.shape).unbind(), dim=1)[:, :length]


def is_too_large(piece: torch.Tensor, sp_size: int) -> bool:
    """Return True if the predictions of one batch would exceed 2 GiB on a rank."""
    return piece.numel() * piece.element_size() * sp_size > MAX_BYTES

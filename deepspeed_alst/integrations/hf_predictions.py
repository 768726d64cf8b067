"""Gather P ranks' predictions on the shards of P batches; each rank gets those of its own batch.

Legend: B batch, S whole sequence, s = S/P one shard, P ranks of a sequence.
"""

from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.distributed.collectives import raise_on_all_ranks
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import DataError, ShapeError

_LARGEST = 2 << 30
"""Bytes of one rank's predictions of one batch: fp32 logits of 4k tokens, vocabulary 128k, are 2 GiB."""


def check_predictions(piece: Any, shard_length: int, groups: SequenceGroups) -> None:
    """Raise if predictions cannot be gathered, before other shards are predicted. Collective over all ranks.

    Args:
        piece: this rank's part of one batch, ``[B, s, ...]`` or a tuple of such.
        shard_length: s.
        groups: process groups of the sequence.

    Raises:
        ShapeError: a piece has no sequence dim (on all ranks).
        DataError: the predictions of one batch would exceed 2 GiB on a rank (on all ranks).
    """
    raise_on_all_ranks(_problem(piece, shard_length, groups.sp_size), groups.control_group)


def gather_predictions(pieces: list[Any], length: int, groups: SequenceGroups) -> Any:
    """Gather the predictions of this rank's batch: ``P x [B_k, s_k, ...] -> [B, length, ...]``.

    Piece k is this rank's part of rank k's batch, a tensor or a tuple of tensors. Collective over the sequence's ranks.

    Args:
        pieces: one per rank of the sequence, in rank order.
        length: tokens of this rank's own batch before padding.
        groups: process groups of the sequence.
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
    return piece.numel() * piece.element_size() * sp_size > _LARGEST


def _problem(piece: Any, shard_length: int, sp_size: int) -> DataError | ShapeError | None:
    if isinstance(piece, tuple | list):
        return next((problem for each in piece if (problem := _problem(each, shard_length, sp_size))), None)
    if not isinstance(piece, torch.Tensor) or piece.dim() < 2 or piece.shape[1] != shard_length:
        shown = list(piece.shape) if isinstance(piece, torch.Tensor) else type(piece).__name__
        return ShapeError(
            f"evaluation: what is predicted on a shard must be [batch, {shard_length} tokens, ...] tensors, not "
            f"{shown}. preprocess_logits_for_metrics is called with a shard's logits and must keep its tokens."
        )
    if is_too_large(piece, sp_size):
        num_bytes = piece.numel() * piece.element_size() * sp_size
        return DataError(
            f"evaluation: the predictions of one batch would be {num_bytes / 2**30:.1f} GiB on a rank (shape "
            f"{list(piece.shape)} on a shard, {sp_size} shards), more than {_LARGEST / 2**30:.0f} GiB. Give the "
            "Trainer preprocess_logits_for_metrics (such as an argmax), or prediction_loss_only=True."
        )
    return None

"""The loss of the whole sequence, on every rank, without autograd through a collective.

A rank's share of the loss is the sum of its token losses divided by the sequence's token count; the value is the
all-reduced sum of the shares. DeepSpeed averages gradients over all ranks (parallel/mpu.py), where the ranks of one
sequence must be summed, so the share's gradient is multiplied by the SP degree: exact for powers of 2.

Legend: s tokens of this rank's shard, V vocabulary.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

IGNORED_LABEL = -100


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, whole: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        # A copy also where the dtype is the same: models add to their loss in place.
        return whole.to(share.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.factor, None, None


def shard_divisor(labels: torch.Tensor, num_items: torch.Tensor | float | None = None) -> torch.Tensor:
    """What a sum of token losses is divided by: ``[]`` in fp64, at least 1, on the labels' device.

    The labelled tokens, or ``num_items`` where the caller knows better.
    """
    if num_items is not None:
        return torch.as_tensor(num_items, device=labels.device).double()
    return _count(labels).clamp(min=1.0)


def whole_sequence_divisor(
    labels: torch.Tensor, group: Any, num_items: torch.Tensor | float | None = None
) -> torch.Tensor:
    """The same of a sequence whose tokens are split over a group: the labelled tokens of all its ranks.

    Collective over the group, unless ``num_items`` is given: one all-reduce of a number, no host sync.
    """
    if num_items is not None:
        return shard_divisor(labels, num_items)
    count = _count(labels)
    dist.all_reduce(count, group=group)
    return count.clamp(min=1.0)


def _count(labels: torch.Tensor) -> torch.Tensor:
    # fp64: a token count passes 2**24, where fp32 stops counting, at 17M tokens.
    return (labels != IGNORED_LABEL).sum().double()


def shard_loss(
    logits_sV: torch.Tensor, labels_s: torch.Tensor, divisor: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """This rank's share of a loss, ``[s, V], [s], [] -> []``: the sum of its token losses, divided.

    Labels are shifted already; -100 counts for nothing. Without any label it is 0, not NaN, with gradients 0: the ranks
    of a sequence still meet in its backward.
    """
    # fp32 as transformers' own loss does it; fp64 stays fp64.
    logits_sV = logits_sV if logits_sV.dtype == torch.float64 else logits_sV.float()
    local_sum = F.cross_entropy(
        logits_sV,
        labels_s.to(logits_sV.device),
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return local_sum / divisor.to(local_sum)


def whole_sequence_loss(share: torch.Tensor, group: Any) -> torch.Tensor:
    """The loss of a sequence whose tokens are split over a group: the sum of the ranks' shares, on all of them.

    Collective over the group: one all-reduce of an fp64 number, no host sync.
    """
    return sum_over_shards(share, group)


def sum_over_shards(share: torch.Tensor, group: Any) -> torch.Tensor:
    """The ranks' tensors added, on all of them: a part of the whole sequence's loss, of the same shape and dtype.

    A loss that every rank makes of the sum in the same way has in all ranks' parameters together the gradient of the
    whole sequence, once DeepSpeed has averaged it: each rank hands on to its own share what comes back to it, times P.
    Collective over the group: one all-reduce in fp64, none in the backward, no host sync.
    """
    whole = share.detach().double()
    dist.all_reduce(whole, group=group)
    return _SumOverShards.apply(share, whole, dist.get_world_size(group))

"""Loss of the whole sequence on every rank, without autograd through a collective.

A rank's share is the sum of its token losses divided by the sequence's token count; the loss is the all-reduced sum of
the shares. DeepSpeed averages gradients over all ranks, but those of one sequence must be summed, so a share's gradient
is multiplied by the SP degree. Legend: s tokens of this rank's shard, V vocabulary.
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
        # Copy even if the dtype is the same: models add to their loss in place.
        return whole.to(share.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.factor, None, None


def shard_divisor(labels: torch.Tensor, num_items: torch.Tensor | float | None = None) -> torch.Tensor:
    """Return the divisor of a sum of token losses, ``num_items`` or the count of labels: ``[]``, fp64, at least 1."""
    if num_items is None:
        num_items = (labels != IGNORED_LABEL).sum().clamp(min=1)
    return torch.as_tensor(num_items, device=labels.device).double()


def whole_sequence_divisor(
    labels: torch.Tensor, group: Any, num_items: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Return ``shard_divisor`` of a sequence sharded over a group: the labelled tokens of all its ranks.

    Collective over the group, unless ``num_items`` is given: one all-reduce of a number, no host sync.
    """
    if num_items is None:
        num_items = (labels != IGNORED_LABEL).sum()
        dist.all_reduce(num_items, group=group)
        num_items.clamp_(min=1)
    return shard_divisor(labels, num_items)


def shard_loss(
    logits_sV: torch.Tensor, labels_s: torch.Tensor, divisor: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Compute this rank's share of a loss, ``[s, V], [s], [] -> []``: its summed token losses, divided.

    Labels are shifted already; -100 is ignored. Without any label the loss and its gradients are 0, not NaN.
    """
    # fp32 as in transformers' loss; fp64 stays fp64.
    logits_sV = logits_sV if logits_sV.dtype == torch.float64 else logits_sV.float()
    labels_s = labels_s.to(logits_sV.device)
    local_sum = F.cross_entropy(logits_sV, labels_s, reduction="sum", label_smoothing=label_smoothing)
    return local_sum / divisor.to(local_sum)


def sum_over_shards(share: torch.Tensor, group: Any) -> torch.Tensor:
    """Sum the ranks' shares of a loss, or of a part of it: same shape and dtype, on all ranks of the sequence.

    Each rank passes the incoming gradient, times P, on to its own share. Collective over the group: one all-reduce in
    fp64, none in the backward, no host sync.
    """
    whole = share.detach().double()
    dist.all_reduce(whole, group=group)
    return _SumOverShards.apply(share, whole, dist.get_world_size(group))

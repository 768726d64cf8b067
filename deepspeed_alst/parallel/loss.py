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


class _WholeSequenceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: torch.Tensor, whole: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return whole.to(share.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad * ctx.factor, None, None


def shard_loss(
    logits_sV: torch.Tensor, labels_s: torch.Tensor, num_items: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Cross-entropy of this rank's shard alone, ``[s, V], [s] -> []``, for programs that aggregate it themselves.

    The mean over the shard's labelled tokens, or the sum divided by ``num_items``. Without any label 0, not NaN, with
    gradients 0: the ranks of a sequence still meet in its backward.
    """
    local_sum, count = _token_losses(logits_sV, labels_s)
    divisor = count.clamp(min=1.0) if num_items is None else torch.as_tensor(num_items, device=count.device)
    return local_sum / divisor.to(local_sum.dtype)


def whole_sequence_loss(
    logits_sV: torch.Tensor,
    labels_s: torch.Tensor,
    group: Any,
    num_items: torch.Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy of a sequence whose tokens are split over a group: ``[s, V], [s] -> []``, the same on all ranks.

    Labels are shifted already; -100 counts for nothing. Divided by the number of labelled tokens on all ranks, or by
    ``num_items`` where the caller knows better. A sequence without any label has loss 0 and gradients 0.
    Collective over the group: one all-reduce of two fp64 numbers, no host sync.
    """
    local_sum, local_count = _token_losses(logits_sV, labels_s, label_smoothing)
    totals = torch.stack([local_sum.detach().double(), local_count])
    dist.all_reduce(totals, group=group)
    whole_sum, count = totals.unbind()
    divisor = count.clamp(min=1.0)
    if num_items is not None:
        divisor = torch.as_tensor(num_items, device=divisor.device).to(divisor.dtype)
    share = local_sum / divisor.to(local_sum.dtype)
    return _WholeSequenceLoss.apply(share, whole_sum / divisor, dist.get_world_size(group))


def _token_losses(
    logits_sV: torch.Tensor, labels_s: torch.Tensor, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the token losses, and in fp64 the number of labelled tokens."""
    # fp32 as transformers' own loss does it; fp64 stays fp64.
    logits_sV = logits_sV if logits_sV.dtype == torch.float64 else logits_sV.float()
    labels_s = labels_s.to(logits_sV.device)
    local_sum = F.cross_entropy(
        logits_sV, labels_s, ignore_index=IGNORED_LABEL, reduction="sum", label_smoothing=label_smoothing
    )
    # fp64: a token count passes 2**24, where fp32 stops counting, at 17M tokens.
    return local_sum, (labels_s != IGNORED_LABEL).sum().double()

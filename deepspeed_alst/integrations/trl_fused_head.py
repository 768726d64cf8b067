"""TRL's fused LM head under sequence parallelism.

It returns the log-probability of each labelled token of this rank's shard, whose sum TRL's trainers divide by their own
count. The sum is therefore made the full sequence's, with the gradient of the package's own loss.
"""

from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext


class _SummedOverShards(torch.autograd.Function):
    """``[B, s] -> [B, s]`` with the full sequence's sum and the gradient times P (distributed/sequence_loss.py)."""

    @staticmethod
    def forward(ctx: Any, log_probs_Bs: torch.Tensor, others: torch.Tensor, factor: int) -> torch.Tensor:
        ctx.factor = factor
        return log_probs_Bs + (others / log_probs_Bs.numel()).to(log_probs_Bs.dtype)

    @staticmethod
    def backward(ctx: Any, grad_Bs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad_Bs * ctx.factor, None, None


def has_fused_head(output: Any) -> bool:
    """Return True if an output is a fused head's: log-probabilities computed in tiles, no logits."""
    return getattr(output, "log_probs", None) is not None and getattr(output, "label_mask", None) is not None


def sum_fused_head(spec: ModelSpec, group: Any, calls: ForwardContext, patches: PatchSet) -> None:
    """Make the sums of a fused head's output the full sequence's; ``patches.close()`` undoes it."""

    def sum_output(module: torch.nn.Module, args: Any, output: Any) -> Any:
        if calls.whole or not has_fused_head(output):
            return None
        log_probs_Bs, mask_Bs = output.log_probs, output.label_mask
        local = log_probs_Bs.detach().double().sum()
        totals = torch.stack([local, mask_Bs.sum().double()])
        dist.all_reduce(totals, group=group)
        whole_sum, count = totals.unbind()
        output["log_probs"] = _SummedOverShards.apply(log_probs_Bs, whole_sum - local, dist.get_world_size(group))
        calls.note_loss(output["log_probs"])
        output["loss"] = -output["log_probs"].sum() / count.clamp(min=1.0).to(log_probs_Bs.dtype)
        if getattr(output, "aux_loss", None) is not None:  # the full sequence's already (moe/mixtures.py)
            output["loss"] = output["loss"] + getattr(spec.text_config, "router_aux_loss_coef", 0.0) * output.aux_loss
        return output

    patches.hook(spec.outer, "forward", sum_output)

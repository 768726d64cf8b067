"""TRL's fused LM head under sequence parallelism.

It returns the log-probability of each labelled token of this rank's shard. TRL's loss of a shard divides their sum by
its own count, so the sum is made the full sequence's, with the gradient of the package's own loss. In a batch that the
engine splits, the numbers of all shards are gathered instead, 4 bytes a token, for a loss of the program's own.
"""

from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


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
        if calls.gathers_tokens:
            from deepspeed_alst.distributed.gather import gather_tokens  # whole batches alone need it

            for key in PER_TOKEN:
                if (x_Bs := output.get(key)) is not None:
                    output[key] = gather_tokens(x_Bs, group)
                    calls.note_loss(output[key])
            count = output.label_mask.sum()
        else:
            log_probs_Bs, mask_Bs = output.log_probs, output.label_mask
            local = log_probs_Bs.detach().double().sum()
            totals = torch.stack([local, mask_Bs.sum().double()])
            dist.all_reduce(totals, group=group)
            whole_sum, count = totals.unbind()
            output["log_probs"] = _SummedOverShards.apply(log_probs_Bs, whole_sum - local, dist.get_world_size(group))
            calls.note_loss(output["log_probs"])
        output["loss"] = -output["log_probs"].sum() / count.clamp(min=1).to(output["log_probs"].dtype)
        if getattr(output, "aux_loss", None) is not None:  # the full sequence's already (moe/mixtures.py)
            output["loss"] = output["loss"] + getattr(spec.text_config, "router_aux_loss_coef", 0.0) * output.aux_loss
        return output

    patches.hook(spec.outer, "forward", sum_output)

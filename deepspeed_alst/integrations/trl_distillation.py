"""TRL's DistillationTrainer and GKDTrainer on the logits of two split models.

Their own losses read bodies and heads past the engines, or stack the logits of both models. Here the engines run, and
functions of both logits in the tiles of the loss. Legend: B batch, K tokens, V vocabulary.
"""

import math
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL


def distil_logits(trainer: Any, patches: PatchSet) -> None:
    """Have a trainer that distils make its loss of the engines' logits; nothing for other trainers."""
    if hasattr(trainer, "_forward_redirection"):
        patches.set(trainer, "_forward_redirection", lambda student, *rest: _of_completions(trainer, student, *rest))
    if hasattr(trainer, "generalized_jsd_loss"):
        patches.set(trainer, "generalized_jsd_loss", _of_labels)


def _of_completions(trainer: Any, student: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, sum of entropies, and number of tokens, as ``DistillationTrainer._compute_loss``."""
    *_, inputs, num_items = rest
    K = inputs["completion_ids"].shape[1]
    mask_BK = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
    batch = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "use_cache": False,
    }
    own_BKV = _log_probs(student(**batch).logits[:, -K - 1 : -1], trainer.temperature)
    trainer.teacher_model.eval()
    with torch.no_grad():
        teacher_BKV = _log_probs(trainer.teacher_model(**batch).logits[:, -K - 1 : -1], trainer.temperature)
        entropy_BK = -(own_BKV.exp() * own_BKV).sum(-1)
    loss = _mean(_divergence(own_BKV, teacher_BKV, trainer.beta), mask_BK, num_items)
    return loss, entropy_BK.masked_fill(~mask_BK, 0).sum(), mask_BK.sum()


def _of_labels(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    beta: float,
    num_items_in_batch: Any,
) -> torch.Tensor:
    """Return the loss of ``GKDTrainer.generalized_jsd_loss``, with its names."""
    found_BK = _divergence(_log_probs(student_logits), _log_probs(teacher_logits), beta)
    return _mean(found_BK, labels != IGNORED_LABEL, num_items_in_batch)


def _mean(found_BK: torch.Tensor, mask_BK: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    return found_BK.masked_fill(~mask_BK, 0).sum() / (mask_BK.sum().clamp(min=1) if num_items is None else num_items)


def _log_probs(logits_BKV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits_BKV.float() / temperature).log_softmax(-1)


def _divergence(own_BKV: torch.Tensor, teacher_BKV: torch.Tensor, beta: float) -> torch.Tensor:
    """Return forward KL (beta 0), reverse KL (1) or the Jensen-Shannon divergence between: ``[B, K, V] -> [B, K]``."""
    if beta == 0:
        return (teacher_BKV.exp() * (teacher_BKV - own_BKV)).sum(-1)
    if beta == 1:
        return (own_BKV.exp() * (own_BKV - teacher_BKV)).sum(-1)
    mixed_BKV = torch.logaddexp(own_BKV + math.log1p(-beta), teacher_BKV + math.log(beta))
    of_teacher_BKV = teacher_BKV.exp() * (teacher_BKV - mixed_BKV)
    return (beta * of_teacher_BKV + (1 - beta) * own_BKV.exp() * (own_BKV - mixed_BKV)).sum(-1)

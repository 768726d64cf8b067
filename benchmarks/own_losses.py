"""Losses that a program makes of logits and hidden states, of one sample: ``loss(model, batch) -> []``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_BETA = 0.05
_VOCAB_SEED = 23


def _log_probs(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the labels' log-probabilities, 0 without a label, and their mask: ``[B, S, V] -> [B, S - 1]`` twice."""
    labels = batch["labels"][:, 1:]
    log_probs = logits[:, :-1].float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return log_probs * (labels >= 0), labels >= 0


def entropy(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a negative log-likelihood less a tenth of the entropy."""
    logits = model(input_ids=batch["input_ids"]).logits
    log_probs, mask = _log_probs(logits, batch)
    all_log_probs = F.log_softmax(logits[:, :-1].float(), dim=-1)
    spread = -(all_log_probs.exp() * all_log_probs).sum(-1)
    return -(log_probs + 0.1 * spread * mask).sum() / mask.sum()


def preference(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a preference loss of the sample's first half over its second."""
    log_probs, _ = _log_probs(model(input_ids=batch["input_ids"]).logits, batch)
    chosen, rejected = (half.sum() for half in log_probs.tensor_split(2, dim=1))
    return -F.logsigmoid(_BETA * (chosen - rejected))


def distillation(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the divergence from a fixed distribution of the token after each token."""
    logits = model(input_ids=batch["input_ids"]).logits.float()
    make = torch.Generator().manual_seed(_VOCAB_SEED)
    table = torch.randn((logits.shape[-1], logits.shape[-1]), generator=make).log_softmax(-1)
    wanted = table.to(logits.dtype)[batch["input_ids"]]
    apart = F.kl_div(logits.log_softmax(-1), wanted, reduction="none", log_target=True).sum(-1)
    return apart.mean()


def by_hand(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a shifted cross-entropy from flat logits, with label smoothing."""
    logits = model(input_ids=batch["input_ids"]).logits[..., :-1, :].float()
    return F.cross_entropy(logits.reshape(-1, logits.size(-1)), batch["labels"][:, 1:].reshape(-1), label_smoothing=0.1)


def hidden_states(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the model's loss, and the distance of a middle layer's mean from the last token's state."""
    outputs = model(**batch, output_hidden_states=True)
    middle, last = outputs.hidden_states[1].mean(1), outputs.hidden_states[-1][:, -1]
    return outputs.loss + (1 - F.cosine_similarity(middle.float(), last.float(), dim=-1)).sum()


OWN_LOSSES: dict[str, Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]] = {
    each.__name__: each for each in (entropy, preference, distillation, by_hand, hidden_states)
}

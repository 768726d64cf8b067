"""Losses that a program makes of logits and hidden states, of one sample: ``loss(model, batch) -> []``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_BETA = 0.05
_VOCAB_SEED = 23
NUM_LABELS = {"classes": 3, "reward": 1}
"""Outputs of the sequence classifier that a loss is of, in place of a causal language model."""
NUM_PROMPTS = {"soft_prompt": 4}
"""Virtual tokens, ``model.prompt``, that a loss puts before the sequence."""


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


def _reference(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a fixed model's log-probabilities of the tokens: ``[B, S - 1]``."""
    ids, make = batch["input_ids"], torch.Generator().manual_seed(_VOCAB_SEED)
    table = (1.5 * torch.randn((logits.shape[-1], logits.shape[-1]), generator=make)).log_softmax(-1)
    return table[ids[:, :-1], ids[:, 1:]]


def _ratios(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities, those less the reference's, and the labels' mask: ``[B, S - 1]`` each."""
    logits = model(input_ids=batch["input_ids"]).logits
    log_probs, mask = _log_probs(logits, batch)
    return log_probs, log_probs - _reference(logits, batch) * mask, mask


def _of_halves(x: torch.Tensor) -> torch.Tensor:
    """Return the sums of the sample's halves, which stand for two completions: ``[1, S] -> [2]``."""
    return torch.stack([half.sum() for half in x.tensor_split(2, dim=1)])


def dpo(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute DPO's sigmoid loss."""
    chosen, rejected = _of_halves(_ratios(model, batch)[1])
    return -F.logsigmoid(_BETA * (chosen - rejected))


def hinge(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute DPO's hinge loss."""
    chosen, rejected = _of_halves(_ratios(model, batch)[1])
    return F.relu(1 - 0.4 * _BETA * (chosen - rejected))


def ipo(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute IPO's loss, of averages over tokens."""
    _, ratios, mask = _ratios(model, batch)
    chosen, rejected = _of_halves(ratios) / _of_halves(mask).clamp(min=1)
    return (chosen - rejected - 1 / (2 * 10 * _BETA)).square()


def kto(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute KTO's loss, with the divergence estimated on mismatched tokens."""
    with torch.no_grad():
        mismatched = {key: x.flip(1) for key, x in batch.items()}
        divergence = _ratios(model, mismatched)[1].sum().clamp(min=0)
    chosen, rejected = _of_halves(_ratios(model, batch)[1])
    gains = torch.stack([chosen - divergence, divergence - rejected])
    return (1 - torch.sigmoid(0.4 * _BETA * gains)).mean()


def grpo(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute GRPO's loss: ratios to an older policy, clipped, and the divergence from a reference."""
    log_probs, apart, mask = _ratios(model, batch)
    older = log_probs.detach() + 0.4 * torch.sin(batch["input_ids"][:, 1:].to(log_probs.dtype))
    ratios, advantages = (log_probs - older).exp(), torch.linspace(1, -1, mask.shape[1]).to(log_probs.dtype)
    gains = torch.min(ratios * advantages, ratios.clamp(0.8, 1.28) * advantages)
    return ((0.04 * ((-apart).exp() + apart - 1) - gains) * mask).sum() / mask.sum()


def rloo(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute RLOO's loss: ratios of completions, and rewards less the divergence and the other's reward."""
    log_probs, apart, _ = _ratios(model, batch)
    sums = _of_halves(log_probs)
    rewards = torch.tensor([1.0, 0.2]).to(sums.dtype) - 0.02 * _of_halves(apart).detach()
    older = sums.detach() + torch.tensor([0.1, -0.1]).to(sums.dtype)
    advantages, ratios = rewards - rewards.flip(0), (sums - older).exp()
    return -torch.min(ratios * advantages, ratios.clamp(0.8, 1.2) * advantages).mean()


def soft_prompt(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute the model's loss behind trained virtual tokens."""
    inner, count = getattr(model, "module", model), NUM_PROMPTS["soft_prompt"]
    tokens, prompt = inner.get_input_embeddings()(batch["input_ids"]), inner.prompt(torch.arange(count)[None])
    labels = F.pad(batch["labels"], (count, 0), value=-100)
    return model(inputs_embeds=torch.cat([prompt, tokens], 1), labels=labels).loss


def classes(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute a classifier's own loss, of its last token."""
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"][:, 3] % NUM_LABELS["classes"]).loss


def reward(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Compute Bradley and Terry's loss of the sample over its reverse."""
    ids = batch["input_ids"]
    chosen, rejected = model(input_ids=torch.cat([ids, ids.flip(1)])).logits.squeeze(-1).float()
    return -F.logsigmoid(chosen - rejected)


OWN_LOSSES: dict[str, Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]] = {
    each.__name__: each
    for each in (
        *(entropy, preference, distillation, by_hand, hidden_states),
        *(dpo, hinge, ipo, kto, grpo, rloo, soft_prompt, classes, reward),
    )
}

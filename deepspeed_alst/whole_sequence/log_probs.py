"""Log-probabilities of whole sequences, for a loss that a program makes itself.

Legend: B batch, S whole sequence, s one shard, t tokens of a tile, V vocabulary.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.data.sharding import shift_labels
from deepspeed_alst.data.validation import LABEL_KEYS
from deepspeed_alst.distributed.gather import gather_tokens
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import DataError
from deepspeed_alst.tiling.lazy_logits import LazyLogits
from deepspeed_alst.tiling.tiled_loss import logits_for_loss
from deepspeed_alst.whole_sequence.batches import forward_whole_batch


def log_probs(engine: Any, batch: dict[str, Any], temperature: float = 1.0) -> torch.Tensor:
    """Return each token's log-probability after those before it, with its gradient: ``[B, S] -> [B, S - 1]``, fp32.

    Under sequence parallelism every rank of a sequence calls it with the same whole batch, computes its shard in tiles
    of ``alst.tiled_logits_loss``, and gets the numbers of all; a loss made of them is the same on all, and goes to
    ``engine.backward``. Without gradients each rank may have its own batch.

    Args:
        engine: engine that ``deepspeed.initialize`` returned.
        batch: the model's arguments, ``input_ids`` among them, and ``attention_mask`` if rows are padded; the number of
            a token is 0 if it or the one before it is padding. ``shard_dataloader(loader, engine, whole=True)`` gives
            the batches of all ranks in turn.
        temperature: divisor of the logits.

    Raises:
        DataError: there are no ``input_ids``; in training, the ranks of a sequence have different batches.
    """
    batch = {key: x for key, x in batch.items() if key not in LABEL_KEYS and x is not None}
    if not isinstance(batch.get("input_ids"), torch.Tensor):
        raise DataError("log_probs: the batch has no input_ids, whose log-probabilities it returns")
    session, labels_BS = getattr(engine, "alst", None), batch["input_ids"]
    if isinstance(mask_BS := batch.get("attention_mask"), torch.Tensor):
        is_padding_BS = mask_BS == 0
        labels_BS = labels_BS.masked_fill(is_padding_BS | F.pad(is_padding_BS[:, :-1], (1, 0)), IGNORED_LABEL)
    if session is not None and session.splits_decoder:
        raise DataError(
            "log_probs: the engine's model is a module around a language model, or has no language model's head; make "
            "them of outputs.logits (docs/own_losses.md)"
        )
    if session is None:
        return _of_labels(engine, batch, shift_labels(labels_BS), temperature)[:, :-1]

    def forward(**shard: Any) -> _Numbers:
        labels_Bs, group = shard.pop("shift_labels"), session.groups.sp_group
        shard.pop("labels")
        numbers_Bs = _of_labels(engine, shard, labels_Bs, temperature)
        return _Numbers(log_probs=gather_tokens(numbers_Bs, group), label_mask=labels_Bs)

    found = forward_whole_batch(session, forward, {**batch, "labels": labels_BS}).log_probs
    session.calls.note_loss(found)
    return found


class _Numbers(dict[str, torch.Tensor]):
    """Output of a forward, in the form of TRL's fused head."""

    def __getattr__(self, name: str) -> torch.Tensor | None:
        return self.get(name)


def _of_labels(engine: Any, batch: dict[str, Any], labels_Bs: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probabilities of shifted labels, 0 for those of -100: ``[B, s] -> [B, s]``."""
    session, head = getattr(engine, "alst", None), getattr(ModelSpec(engine.module).model, "alst_head", None)
    calls = session.calls if session is not None else getattr(head, "calls", None)
    with contextlib.nullcontext() if calls is None else calls.having(loss_follows=True):
        output = engine(**batch | {"use_cache": False})
    logits = logits_for_loss(output)

    def of_tile(logits_tV: torch.Tensor, labels_t1: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(logits_tV.dtype, torch.float32)
        log_probs_tV = (logits_tV.to(wide) / temperature).log_softmax(-1)
        return log_probs_tV.gather(-1, labels_t1.clamp(min=0)).masked_fill(labels_t1 < 0, 0)

    if isinstance(logits, LazyLogits):
        return logits.of_tokens(of_tile, labels_Bs.reshape(-1, 1)).view_as(labels_Bs)
    return of_tile(logits, labels_Bs.unsqueeze(-1)).squeeze(-1)

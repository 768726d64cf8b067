"""Checks of a whole batch before it is cut: ids and labels, mask, packed documents.

Packed documents share a row and must not attend to one another. They are given by position ids that restart, by the
``cu_seq_lens_q`` of packing collators, or both. Legend: B batch, S whole sequence, N documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import DataError

LABEL_KEYS = ("labels", "shift_labels")
_TENSORS = ("input_ids", *LABEL_KEYS, "inputs_embeds", "position_ids")
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary sizes of a model; None if unknown."""

    embeddings: int | None = None
    logits: int | None = None
    of_labels: bool = True
    """False if a batch's labels are not tokens: those of a classifier."""


def vocabulary_of(spec: ModelSpec) -> Vocabulary:
    """Return the numbers of embeddings and of logits, the latter the larger of the config's and the head's."""
    embeddings = getattr(spec.embeddings, "num_embeddings", None)
    sizes = (getattr(spec.text_config, "vocab_size", None), getattr(spec.head, "out_features", None))
    logits = max((size for size in sizes if isinstance(size, int)), default=None)
    return Vocabulary(embeddings if isinstance(embeddings, int) else None, logits, spec.is_causal_lm)


def checked(batch: Any, vocabulary: Vocabulary, takes_gradients: bool = False) -> Any:
    """Return a batch with checked int64 ids and labels; a batch that is not a mapping is returned.

    An out-of-range token would otherwise raise on one rank alone, in its forward, and the others would hang.

    Raises:
        DataError: ids, labels or positions are not tensors, ids or labels are not integers in the range of the
            vocabulary, or a tensor requires a gradient, unless ``takes_gradients``.
    """
    if not isinstance(batch, Mapping):
        return batch
    numbers = {}
    for key, x in batch.items():
        if not isinstance(x, torch.Tensor):
            if key in _TENSORS and x is not None:
                raise DataError(
                    f"{key} is a {type(x).__name__}, not a tensor of shape [batch, sequence] (torch's default_collate "
                    "makes lists of tensors from lists). Use transformers.default_data_collator as the collate_fn, or "
                    "DataCollatorForSeq2Seq to pad"
                )
            continue
        if x.requires_grad and not takes_gradients:
            raise DataError(
                f"{key} requires a gradient, which the exchange between ranks does not pass on. Make it of "
                "a whole batch (shard_dataloader(loader, engine, whole=True)) and call the engine with that, or detach "
                f"it (batch['{key}'].detach())"
            )
        if key == "input_ids" or (key in LABEL_KEYS and vocabulary.of_labels):
            numbers[key] = as_int64(key, x)
            _check_range(key, numbers[key], vocabulary)
    return {**batch, **numbers}


def as_int64(key: str, x: torch.Tensor) -> torch.Tensor:
    """Convert ids or labels of any integer dtype to int64; raise DataError for another dtype."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise DataError(
            f"{key} has dtype {x.dtype}, and must have integers: convert it to torch.int64 in the collate_fn"
        )
    return x.to(torch.int64)


def _check_range(key: str, x_BS: torch.Tensor, vocabulary: Vocabulary) -> None:
    is_label = key in LABEL_KEYS
    size = vocabulary.logits if is_label else vocabulary.embeddings
    if size is None or x_BS.dim() != 2:
        return
    outside_BS = (x_BS < 0) | (x_BS >= size)
    if is_label:
        outside_BS &= x_BS != IGNORED_LABEL
    if outside_BS.any():
        row, token = outside_BS.nonzero()[0].tolist()
        raise DataError(
            f"{key} of row {row} has {int(x_BS[row, token])} at token {token}, and the model has "
            f"{'logits' if is_label else 'embeddings'} for 0 to {size - 1}. Use the model's own tokenizer, or call "
            "model.resize_token_embeddings before deepspeed.initialize"
            f"{f'; a token without a label has {IGNORED_LABEL}' * is_label}"
        )


# --- the mask


def check_mask(mask_BS: torch.Tensor, whole: dict[str, torch.Tensor]) -> None:
    """Raise DataError unless a mask is of ones, or of right padding without labels, which causal attention allows."""
    if mask_BS.dim() != 2:
        raise DataError(
            f"attention_mask has shape {list(mask_BS.shape)}: only [batch, sequence] masks can be split over ranks. "
            "Remove it if it is causal."
        )
    kept_BS = mask_BS != 0
    rising = kept_BS[:, 1:] & ~kept_BS[:, :-1]
    if rising.any():
        row = int(rising.any(dim=1).nonzero()[0, 0])
        what = "padding on the left" if not kept_BS[row, 0] else "holes"
        raise DataError(
            f"attention_mask has {what} in row {row}: causal attention without a mask would see those tokens. "
            "Pad on the right (tokenizer.padding_side = 'right')."
        )
    for key in LABEL_KEYS:
        if key in whole and (labelled_BS := ~kept_BS & (whole[key] != IGNORED_LABEL)).any():
            row = int(labelled_BS.any(dim=1).nonzero()[0, 0])
            raise DataError(
                f"{key} of row {row} has labels on tokens that attention_mask hides, which sequence parallelism does "
                f"not support. Add in the collate_fn: labels[attention_mask == 0] = {IGNORED_LABEL}"
            )


# --- packed documents


def take_bounds(common: dict[str, Any], length: int) -> torch.Tensor | None:
    """Pop a collator's document bounds ``[N + 1]`` from a batch; return None if it has none.

    Raises:
        DataError: they do not rise from 0 to ``length``, or differ for queries and keys.
    """
    for name in ("max_length_q", "max_length_k"):  # computed again after padding
        common.pop(name, None)
    given: torch.Tensor | None = None
    for name in _BOUNDS:
        if (bounds := common.pop(name, None)) is None:
            continue
        if not isinstance(bounds, torch.Tensor) or bounds.dim() != 1 or bounds.is_floating_point() or not len(bounds):
            raise DataError(f"{name} must be a 1-D integer tensor, the bounds of the documents")
        bounds = bounds.long()  # signed, so that diff() is negative at a decrease
        if bounds[0] != 0 or bounds[-1] != length or (bounds.diff() < 0).any():
            raise DataError(
                f"{name} goes from {int(bounds[0])} to {int(bounds[-1])}: it must rise from 0 to the number of tokens "
                f"in the row, {length}"
            )
        if given is not None and not torch.equal(bounds, given):
            raise DataError("cu_seq_lens_q and cu_seq_lens_k differ: only self-attention can be split")
        given = bounds
    return None if given is None else given.unique_consecutive()


def positions_within(bounds: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its document: ``[N + 1] -> [1, S]``."""
    starts = torch.repeat_interleave(bounds[:-1].long(), bounds.long().diff())
    return (torch.arange(int(bounds[-1]), device=bounds.device) - starts)[None]


def document_bounds(
    positions_BS: torch.Tensor, given: torch.Tensor | None, rows: int, packing: bool, by_lowest: bool
) -> torch.Tensor | None:
    """Return the bounds ``[N + 1]`` of a batch's documents, int32; None if every row is one document.

    As in transformers' masks, a document starts where position ids do not increase by one, or with ``by_lowest``, as
    in its flash attention, at each token with the lowest. A single row of positions may stand for all.

    Raises:
        DataError: documents without ``packing``, for an attention that does not separate them; documents in several
            rows; bounds other than those ``given`` by the collator; tokens before the first document.
    """
    starts_BS = _starts(positions_BS)
    if not packing and starts_BS.any():
        row, column = starts_BS.nonzero()[0].tolist()
        raise DataError(
            f"position_ids restart at token {column} of row {row}: this model does not support packed samples under "
            "sequence parallelism. Give one document per row, or leave position_ids out."
        )
    if by_lowest:
        starts_BS = positions_BS == positions_BS.amin(dim=1, keepdim=True)
        if not starts_BS[:, 0].all():
            raise DataError(
                "position_ids do not start at their lowest value, where flash attention starts a document: the first "
                "tokens would be part of none. Start them at the lowest, or leave them out."
            )
        starts_BS[:, 0] = False
    several = bool(starts_BS.any())
    if rows > 1 and (several or given is not None):
        raise DataError(
            f"packed documents in a batch of {rows} rows (position_ids do not increase by one): only one row is "
            "supported. Pack all documents into one row, or leave position_ids out."
        )
    end = starts_BS.new_ones(1)
    bounds = torch.cat([end, starts_BS[0, 1:], end]).nonzero().flatten()
    if given is not None and not torch.equal(bounds, given.to(bounds)):
        raise DataError(
            f"documents end at {_few(given[1:])} by cu_seq_lens_q, and at {_few(bounds[1:])} by position_ids. Leave "
            "one of the two out."
        )
    return bounds.to(torch.int32) if several or (packing and given is not None) else None


def _few(ends: torch.Tensor) -> str:
    return ", ".join(map(str, ends[:4].tolist())) + (", ..." if len(ends) > 4 else "")


def _starts(positions_BS: torch.Tensor) -> torch.Tensor:
    """Mark the starts of documents inside a row, its first token excluded: ``[B, S] -> [B, S]`` bool."""
    return F.pad(positions_BS[:, 1:] != positions_BS[:, :-1] + 1, (1, 0))


def check_numbers(seq_idx_BS: torch.Tensor, positions_BS: torch.Tensor) -> None:
    """Raise DataError if ``seq_idx``, the number of each token's document, contradicts the position ids."""
    changes_BS = F.pad(seq_idx_BS[:, 1:] != seq_idx_BS[:, :-1], (1, 0))
    wrong = (changes_BS != _starts(positions_BS)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"seq_idx {'starts' if changes_BS[row, column] else 'does not start'} a document at token {column} of row "
            f"{row}, unlike position_ids. Make them agree, or leave seq_idx out."
        )

"""Checks of a whole batch before it is cut: ids and labels, mask, packed documents.

Packed documents share a row and must not attend to one another. They are given by position ids that restart, by the
sequence lengths of packing collators (``cu_seq_lens_q``), or both. Legend: B batch, S whole sequence, N documents.
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
_TOKENS = ("input_ids", *LABEL_KEYS)
_TENSORS = (*_TOKENS, "inputs_embeds", "position_ids")
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")


# --- ids and labels


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary sizes of a model; None if unknown."""

    embeddings: int | None = None
    logits: int | None = None


def vocabulary_of(spec: ModelSpec) -> Vocabulary:
    """Return the numbers of embeddings and of logits, the latter the larger of the config's and the head's."""
    embeddings = getattr(spec.embeddings, "num_embeddings", None)
    sizes = (getattr(spec.text_config, "vocab_size", None), getattr(spec.head, "out_features", None))
    logits = max((size for size in sizes if isinstance(size, int)), default=None)
    return Vocabulary(embeddings if isinstance(embeddings, int) else None, logits)


def checked(batch: Any, vocabulary: Vocabulary) -> Any:
    """Return a batch with checked int64 ids and labels; a batch that is no mapping is returned as it is.

    An out-of-range token would otherwise raise on one rank alone, in its forward, and the others would hang.

    Raises:
        DataError: ids, labels or positions are no tensor, or ids and labels not of an integer dtype; a token has no
            embedding, a label no logit; a tensor requires a gradient.
    """
    if not isinstance(batch, Mapping):
        return batch
    numbers = {}
    for key, x in batch.items():
        if not isinstance(x, torch.Tensor):
            if key in _TENSORS and x is not None:
                raise DataError(
                    f"{key} is a {type(x).__name__}, not a tensor (of lists in a dataset, torch's own collate_fn makes "
                    "lists of tensors). Make one of shape [batch, sequence] in the loader's collate_fn: "
                    "transformers.default_data_collator does, and DataCollatorForSeq2Seq pads too"
                )
            continue
        if x.requires_grad:
            raise DataError(
                f"{key} requires a gradient, which ends at the exchange between ranks: what has made it would not be "
                f"trained. Detach it, batch['{key}'].detach(), if that is meant; else make it within the model that "
                "deepspeed.initialize is given"
            )
        if key in _TOKENS:
            numbers[key] = as_int64(key, x)
            _check_range(key, numbers[key], vocabulary)
    return {**batch, **numbers}


def as_int64(key: str, x: torch.Tensor) -> torch.Tensor:
    """Convert ids or labels of any integer dtype to int64; raise DataError for another dtype."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise DataError(
            f"{key} has dtype {x.dtype}, and must have whole numbers: make them torch.int64 in the dataset or the "
            "collate_fn"
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
            f"{'logits' if is_label else 'embeddings'} for 0 to {size - 1}. Use the model's own tokenizer, or "
            "model.resize_token_embeddings before deepspeed.initialize"
            f"{f'; a token without a label has {IGNORED_LABEL}' * is_label}"
        )


# --- the mask


def check_mask(mask_BS: torch.Tensor, whole: dict[str, torch.Tensor]) -> None:
    """Raise DataError for a mask that causal attention does not make redundant.

    It may be ones, or have zeros on the right, on tokens without labels.
    """
    if mask_BS.dim() != 2:
        raise DataError(
            f"attention_mask has {mask_BS.dim()} dims, shape {list(mask_BS.shape)}: only [batch, sequence] masks "
            "can be split over ranks. Remove it where it is plain causal."
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
                f"{key} of row {row} has labels on tokens that attention_mask hides, so the loss would train the "
                "model to write padding, of which each token sees the sample and no other padding: not available "
                "under sequence parallelism. Add where the labels are made: "
                f"labels[attention_mask == 0] = {IGNORED_LABEL}"
            )


# --- packed documents


def take_bounds(common: dict[str, Any], length: int) -> torch.Tensor | None:
    """Pop a collator's document bounds ``[N + 1]`` from a batch; return None if it has none.

    Raises:
        DataError: they are not the bounds of documents that fill the row, or differ for queries and keys.
    """
    for name in ("max_length_q", "max_length_k"):  # for flash attention, which measures again after padding
        common.pop(name, None)
    given: torch.Tensor | None = None
    for name in _BOUNDS:
        if (bounds := common.pop(name, None)) is None:
            continue
        if not isinstance(bounds, torch.Tensor) or bounds.dim() != 1 or bounds.is_floating_point() or not len(bounds):
            raise DataError(f"{name} must be one row of whole numbers, the documents' bounds")
        bounds = bounds.long()  # signed, so that diff() is negative at a decrease
        if bounds[0] != 0 or bounds[-1] != length or (bounds.diff() < 0).any():
            raise DataError(
                f"{name} goes from {int(bounds[0])} to {int(bounds[-1])}: it must rise from 0 to the number of tokens "
                f"in the row, {length}"
            )
        if given is not None and not torch.equal(bounds, given):
            raise DataError("cu_seq_lens_q and cu_seq_lens_k differ: only attention within a sequence can be split")
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
    in its flash attention, at each token with the lowest.

    ``positions_BS`` is of the whole sequences; a single row may stand for all. Bounds ``given`` by the collator must be
    equal. Without ``packing``, for an attention that does not keep documents apart, they raise DataError.

    Raises:
        DataError: as said, or documents in several rows or unlike ``given``, or tokens before the first.
    """
    starts_BS = _starts(positions_BS)
    if not packing and starts_BS.any():
        row, column = starts_BS.nonzero()[0].tolist()
        raise DataError(
            f"position_ids restart at token {column} of row {row}: this model does not keep packed samples apart under "
            "sequence parallelism. Give one document per row, or leave position_ids out."
        )
    if by_lowest:
        starts_BS = positions_BS == positions_BS.amin(dim=1, keepdim=True)
        if not starts_BS[:, 0].all():
            raise DataError(
                "position_ids start higher than their lowest, at which flash attention starts a document: the tokens "
                "before it would be part of none. Start them at the lowest, or leave them out."
            )
        starts_BS[:, 0] = False
    several = bool(starts_BS.any())
    if rows > 1 and (several or given is not None):
        raise DataError(
            f"packed documents in a batch of {rows} rows (position_ids that do not go on by one): they are kept apart "
            "in a batch of one row only. Pack all of them into one row, or leave position_ids out."
        )
    end = starts_BS.new_ones(1)
    bounds = torch.cat([end, starts_BS[0, 1:], end]).nonzero().flatten()
    if given is not None and not torch.equal(bounds, given.to(bounds)):
        raise DataError(
            f"cu_seq_lens_q has documents that end at {_few(given[1:])}, position_ids some that end at "
            f"{_few(bounds[1:])}. Leave one of the two out."
        )
    return bounds.to(torch.int32) if several or (packing and given is not None) else None


def _few(ends: torch.Tensor) -> str:
    return ", ".join(map(str, ends[:4].tolist())) + (", ..." if len(ends) > 4 else "")


def _starts(positions_BS: torch.Tensor) -> torch.Tensor:
    """Mark the starts of documents inside a row, its first token excluded: ``[B, S] -> [B, S]`` bool."""
    return F.pad(positions_BS[:, 1:] != positions_BS[:, :-1] + 1, (1, 0))


def check_numbers(seq_idx_BS: torch.Tensor, positions_BS: torch.Tensor) -> None:
    """Raise DataError if ``seq_idx``, the number of each token's document, changes where position ids go on."""
    changes_BS = F.pad(seq_idx_BS[:, 1:] != seq_idx_BS[:, :-1], (1, 0))
    wrong = (changes_BS != _starts(positions_BS)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"seq_idx {'starts' if changes_BS[row, column] else 'does not start'} a document at token {column} of row "
            f"{row}, position_ids say the opposite. Make them agree, or leave seq_idx out."
        )

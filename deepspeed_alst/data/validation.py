"""Checks of a batch before it is sharded: integer tensors within the model's vocabulary."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import DataError

_LABELS = ("labels", "shift_labels")
_TOKENS = ("input_ids", *_LABELS)
_TENSORS = (*_TOKENS, "inputs_embeds", "position_ids")


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary sizes of a model; None if unknown."""

    embeddings: int | None = None
    """Size of the input embedding."""
    logits: int | None = None
    """Size of the output, which may differ."""


def whole_numbers(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the ids and labels of a batch, as int64 if they have another integer dtype.

    Raises:
        DataError: they are lists or have a dtype that is not an integer one; names the key.
    """
    for key in _TENSORS:
        if batch.get(key) is not None and not isinstance(batch[key], torch.Tensor):
            raise DataError(
                f"{key} is a {type(batch[key]).__name__}, not a tensor (of lists in a dataset, torch's own collate_fn "
                "makes lists of tensors). Make one of shape [batch, sequence] in the loader's collate_fn: "
                "transformers.default_data_collator does, and DataCollatorForSeq2Seq pads too"
            )
    return {key: as_int64(key, batch[key]) for key in _TOKENS if batch.get(key) is not None}


def as_int64(key: str, x: torch.Tensor) -> torch.Tensor:
    """Convert ids or labels of any integer dtype to int64.

    Raises:
        DataError: the dtype is not an integer one.
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise DataError(
            f"{key} has dtype {x.dtype}, and must have whole numbers: make them torch.int64 in the dataset or the "
            "collate_fn"
        )
    return x.to(torch.int64)


def checked(batch: Any, vocabulary: Vocabulary) -> Any:
    """Return a batch with checked int64 ids and labels; a batch that is no mapping is returned as it is.

    An out-of-range token would otherwise raise on one rank alone, in its forward, and the others would hang.

    Args:
        batch: mapping of names to tensors.
        vocabulary: of the model.

    Raises:
        DataError: see ``whole_numbers``; a token has no embedding, a label no logit; a tensor requires a gradient.
    """
    if not isinstance(batch, Mapping):
        return batch
    for key, x in batch.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise DataError(
                f"{key} requires a gradient, which ends at the exchange between ranks: what has made it would not be "
                f"trained. Detach it, batch['{key}'].detach(), if that is meant; else make it within the model that "
                "deepspeed.initialize is given"
            )
    numbers = whole_numbers(batch)
    for key, x in numbers.items():
        if x.dim() == 2:
            _check_range(key, x, vocabulary)
    return {**batch, **numbers}


def _check_range(key: str, x_BS: torch.Tensor, vocabulary: Vocabulary) -> None:
    """Check that ids have embeddings and labels have logits.

    Raises:
        DataError: names the first that does not, and its position.
    """
    is_label = key in _LABELS
    size = vocabulary.logits if is_label else vocabulary.embeddings
    if size is None:
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


def warn_of_padding(length: int, padded: int, multiple: int) -> None:
    """Warn once on rank 0 if sequences are mostly padding to a multiple of tokens."""
    # Python shows a warning of identical text once.
    if padded > 2 * length and dist.get_rank() == 0:
        warnings.warn(
            "more than half of the tokens of a batch are padding, which costs as much as they do: sequences are padded "
            f"to a multiple of {multiple} tokens. Set alst.pad_to_multiple_of to fewer, or pack the samples.",
            stacklevel=3,
        )


def vocabulary_of(model: torch.nn.Module) -> Vocabulary:
    """Return the numbers of embeddings and of logits, the latter the larger of the config's and the head's."""
    base = base_model(model)
    embeddings = getattr(base.get_input_embeddings(), "num_embeddings", None)
    head = base.get_output_embeddings()
    sizes = (getattr(base.config.get_text_config(), "vocab_size", None), getattr(head, "out_features", None))
    logits = max((size for size in sizes if isinstance(size, int)), default=None)
    return Vocabulary(embeddings if isinstance(embeddings, int) else None, logits)

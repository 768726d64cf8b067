"""What the numbers of a batch must be before it is split: tensors of whole numbers, and labels that have a logit."""

from collections.abc import Mapping
from typing import Any

import torch

from deepspeed_alst.errors import DataError
from deepspeed_alst.parallel.loss import IGNORED_LABEL

_LABELS = ("labels", "shift_labels")
_TOKENS = ("input_ids", *_LABELS)
_TENSORS = (*_TOKENS, "inputs_embeds", "position_ids")


def whole_numbers(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The ids and labels of a batch, as int64 where they are of another integer dtype.

    Raises:
        DataError: they are lists, or of a dtype that has no whole numbers; with the key.
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
    """Ids or labels of any integer dtype, as int64.

    Raises:
        DataError: of another dtype.
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise DataError(
            f"{key} has dtype {x.dtype}, and must have whole numbers: make them torch.int64 in the dataset or the "
            "collate_fn"
        )
    return x.to(torch.int64)


def checked(batch: Any, vocabulary: int | None) -> Any:
    """A batch with ids and labels in int64; what is no mapping is left to who splits it.

    On one rank, a label that is out of range would stop that rank alone, in its loss, and leave the others waiting.

    Args:
        batch: names to tensors.
        vocabulary: how many tokens the model has logits for; None if nobody knows.

    Raises:
        DataError: see ``whole_numbers``; a label has no logit; a tensor requires a gradient.
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
    for key in _LABELS if vocabulary is not None else ():
        if key in numbers and numbers[key].dim() == 2:
            _check_range(key, numbers[key], vocabulary)
    return {**batch, **numbers}


def _check_range(key: str, labels_BS: torch.Tensor, vocabulary: int) -> None:
    outside_BS = ((labels_BS < 0) & (labels_BS != IGNORED_LABEL)) | (labels_BS >= vocabulary)
    if outside_BS.any():
        row, token = outside_BS.nonzero()[0].tolist()
        raise DataError(
            f"{key} of row {row} has {int(labels_BS[row, token])} at token {token}, and the model has logits for 0 to "
            f"{vocabulary - 1}. Use the model's own tokenizer, or model.resize_token_embeddings before "
            f"deepspeed.initialize; a token without a label has {IGNORED_LABEL}"
        )

"""One batch, prepared as a whole and cut into P shards. Pure: no process group, no state.

Legend: B batch, S whole sequence, s = S/P one shard, P ranks of a sequence.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.attention.masks import check_padding_mask, document_starts
from deepspeed_alst.data.packing import check_numbers, documents_of, positions_within, take_bounds, with_padding
from deepspeed_alst.errors import DataError
from deepspeed_alst.parallel.loss import IGNORED_LABEL

REAL_TOKENS = "alst_real_tokens"
"""The key that says which of a batch's tokens are the sample's own, and not padding."""

_LENGTH_KEYS = ("input_ids", "inputs_embeds")
_LABEL_KEYS = ("labels", "shift_labels")
_SPLIT_KEYS = (*_LENGTH_KEYS, *_LABEL_KEYS, "position_ids")


@dataclass(frozen=True)
class ShardedBatch:
    """A batch in P pieces: ``shards[r]`` holds the sequence tensors of rank r, ``common`` what each gets whole."""

    shards: list[dict[str, torch.Tensor]]
    common: dict[str, Any]


def shard_batch(
    batch: Mapping[str, Any], sp_size: int, multiple: int, packing: bool = False, marks_padding: bool = False
) -> ShardedBatch:
    """Pad, shift and cut one batch ``[B, S, ...]`` into ``sp_size`` shards ``[B, s, ...]``.

    ``S`` is padded on the right to a multiple of ``multiple``: labels with -100, the rest with 0, positions with none
    that is higher than the sample's: the last one again, or a count from 0 after packed documents. ``position_ids`` are
    made where absent. ``shift_labels`` are the labels moved by one token, once, before the cut; the last token of a
    document has none. A mask of ones or right padding is dropped. All else goes to every rank as it is.

    With ``packing``, for an attention that keeps packed documents apart, every rank gets the bounds of all of them
    (``cu_seq_lens_q`` and ``_k``, ``[N + 1]``, padding being a document of its own); without it they are refused.
    With ``marks_padding``, for a router's loss, every shard says which of its tokens are no padding, neither the
    mask's nor ours (``alst_real_tokens``, ``[B, s]`` bool).

    Raises:
        DataError: no ``input_ids``; lengths that disagree; a mask or positions that cannot be split.
    """
    whole = _whole_sequences(batch)
    length = _sequence_length(whole)
    made = {*_SPLIT_KEYS, "attention_mask"}
    # None under one of the names that are made or dropped here means that it is absent.
    common = {key: value for key, value in batch.items() if key not in whole and not (key in made and value is None)}
    if (mask := common.pop("attention_mask", None)) is not None:
        _check_mask(mask, whole, length)
    given = take_bounds(common, length)
    tokens = _tokens_of(whole)
    if "position_ids" not in whole:
        row = torch.arange(length, device=tokens.device) if given is None else positions_within(given)
        whole["position_ids"] = row.expand(tokens.shape[0], length)
    # The text positions of multi-dimensional ids ([3, B, S]) are the first of the three.
    positions_BS = whole["position_ids"].reshape(-1, *whole["position_ids"].shape[-2:])[0]
    documents = documents_of(positions_BS, given, tokens.shape[0], packing)
    starts_BS = document_starts(positions_BS)
    if "seq_idx" in whole:
        check_numbers(whole["seq_idx"], starts_BS)
    if "labels" in whole and "shift_labels" not in whole:
        # The first label of a document is nobody's. The packing collators mask it as well.
        whole["labels"] = whole["labels"].masked_fill(starts_BS, IGNORED_LABEL)
        whole["shift_labels"] = shift_labels(whole["labels"], starts_BS)
    if marks_padding:
        whole[REAL_TOKENS] = _real_tokens(mask, tokens)
    padded = -(-length // multiple) * multiple
    if documents is not None:
        common |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), with_padding(documents, padded))
    pieces = {
        key: _pad(key, x, padded, documents is not None).tensor_split(sp_size, _sequence_dim(key))
        for key, x in whole.items()
    }
    return ShardedBatch([{key: cut[rank] for key, cut in pieces.items()} for rank in range(sp_size)], common)


def shift_labels(labels_BS: torch.Tensor, starts_BS: torch.Tensor) -> torch.Tensor:
    """The label of each token is the next token's: ``[B, S] -> [B, S]``, none at the end of a row or document."""
    # A token whose successor starts a document predicts nothing.
    masked_BS = labels_BS.masked_fill(starts_BS, IGNORED_LABEL)
    return F.pad(masked_BS[:, 1:], (0, 1), value=IGNORED_LABEL)


def _real_tokens(mask_BS: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    if mask_BS is None:
        return tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    return (mask_BS != 0).expand(tokens.shape[:2])


def _check_mask(mask_BS: Any, whole: dict[str, torch.Tensor], length: int) -> None:
    """Accept a mask that can be dropped: ones, or right padding that has no label."""
    if not isinstance(mask_BS, torch.Tensor):
        raise DataError(f"attention_mask must be a tensor, not {type(mask_BS).__name__}")
    _check_same_length("attention_mask", mask_BS, -1, length)
    _check_same_rows("attention_mask", mask_BS, len(_tokens_of(whole)))
    check_padding_mask(mask_BS)
    for key in _LABEL_KEYS:
        if key in whole:
            labelled_BS = (mask_BS == 0) & (whole[key] != IGNORED_LABEL)
            if labelled_BS.any():
                row = int(labelled_BS.any(dim=1).nonzero()[0, 0])
                raise DataError(
                    f"{key} of row {row} has labels on tokens that attention_mask hides; set them to {IGNORED_LABEL}: "
                    "padding has no label"
                )


def _sequence_dim(key: str) -> int:
    # position_ids may be [S], [B, S] or, for multi-dimensional rotary embeddings, [3, B, S].
    return -1 if key == "position_ids" else 1


def _whole_sequences(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a batch that have a sequence dim."""
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a batch must be a mapping of names to tensors (input_ids, labels, ...), not {type(batch).__name__}; "
            "give the loader a collate_fn that returns a dict"
        )
    anchor = next((batch[key] for key in _LENGTH_KEYS if isinstance(batch.get(key), torch.Tensor)), None)
    if anchor is None or anchor.dim() < 2:
        raise DataError(
            "a batch needs input_ids or inputs_embeds of shape [batch, sequence, ...]; got the keys "
            f"{sorted(batch, key=str)}"
        )
    if not len(anchor):
        raise DataError("a batch has no rows; leave it out")
    whole = {}
    for key, value in batch.items():
        if key in _SPLIT_KEYS and value is not None and not isinstance(value, torch.Tensor):
            raise DataError(f"{key} must be a tensor, not {type(value).__name__}; make it one in the collate_fn")
        if not isinstance(value, torch.Tensor) or key == "attention_mask":
            continue
        if key == "position_ids":
            whole[key] = value.expand(anchor.shape[0], -1) if value.dim() == 1 else value
        elif key in _LENGTH_KEYS + _LABEL_KEYS or (value.dim() >= 2 and value.shape[:2] == anchor.shape[:2]):
            whole[key] = value
    return whole


def _tokens_of(whole: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(whole[key] for key in _LENGTH_KEYS if key in whole)


def _sequence_length(whole: dict[str, torch.Tensor]) -> int:
    rows, length = _tokens_of(whole).shape[:2]
    for key, x in whole.items():
        _check_same_length(key, x, _sequence_dim(key), length)
        _check_same_rows(key, x, rows)
        if x.dim() != 2 and key in ("input_ids", *_LABEL_KEYS):
            raise DataError(f"{key} has shape {list(x.shape)}, and must be [batch, sequence]")
    if not length:
        raise DataError("a batch has sequences of length 0; leave empty documents out")
    return length


def _check_same_length(key: str, x: torch.Tensor, dim: int, length: int) -> None:
    if x.dim() < 2 or x.shape[dim] != length:
        raise DataError(f"{key} has shape {list(x.shape)}, but the sequences of its batch have {length} tokens")


def _check_same_rows(key: str, x: torch.Tensor, rows: int) -> None:
    found = x.shape[-2 if key == "position_ids" else 0]
    # One row of positions, or of a mask, stands for all.
    if found != rows and (found != 1 or key not in ("position_ids", "attention_mask")):
        raise DataError(f"{key} has shape {list(x.shape)}, but its batch has {rows} rows")


def _pad(key: str, x: torch.Tensor, padded: int, packed: bool) -> torch.Tensor:
    dim = _sequence_dim(key) % x.dim()
    missing = padded - x.shape[dim]
    if not missing:
        return x
    if key == "position_ids":
        last = x[..., -1:].expand(*x.shape[:-1], missing)
        # What goes by a sequence's length takes the highest position for it, and learned positions have an end.
        counted = torch.arange(missing, dtype=x.dtype, device=x.device).clamp(max=x.max()).expand_as(last)
        return torch.cat([x, counted if packed else last], dim)
    value = IGNORED_LABEL if key in _LABEL_KEYS else 0
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing], value=value)

"""Preparation of one whole batch and its cut into P shards. Pure: no process group, no state.

Legend: B batch, S whole sequence, s = S/P one shard, P ranks of a sequence.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.data.document_masks import check_one_document, check_padding_mask, document_starts
from deepspeed_alst.data.packing import check_numbers, documents_of, positions_within, take_bounds, with_padding
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import DataError

REAL_TOKENS = "alst_real_tokens"
"""Key of the mask of a sample's own tokens, as opposed to padding."""

PLACE = "alst_place"
"""Key of a shard's rank and its batch's fingerprint, ``[2]``, for position ids that do not identify them."""

_LENGTH_KEYS = ("input_ids", "inputs_embeds")
_LABEL_KEYS = ("labels", "shift_labels")
_SPLIT_KEYS = (*_LENGTH_KEYS, *_LABEL_KEYS, "position_ids")
_MADE = (*_SPLIT_KEYS, "attention_mask")


@dataclass(frozen=True)
class ShardedBatch:
    """Batch in P pieces: ``shards[r]`` has the sequence tensors of rank r, ``common`` is whole on every rank."""

    shards: list[dict[str, torch.Tensor]]
    common: dict[str, Any]


def shard_batch(
    batch: Mapping[str, Any],
    sp_size: int,
    multiple: int,
    packing: bool = False,
    marks_padding: bool = False,
    by_lowest: bool = False,
) -> ShardedBatch:
    """Pad, shift and cut one batch ``[B, S, ...]`` into ``sp_size`` shards ``[B, s, ...]``.

    ``S`` is padded on the right to a multiple of ``multiple``: labels with -100, other tensors with 0, position ids
    with the last one again, or after packed documents with a count from 0, at most the sample's highest.
    ``position_ids`` are created if absent. ``shift_labels`` are the row's labels shifted by one token, as transformers'
    loss shifts them. A mask of ones or right padding is dropped. Everything else goes to every rank unchanged.

    With ``packing``, for an attention that keeps packed documents apart, every rank gets the bounds of all of them
    (``cu_seq_lens_q`` and ``_k``, ``[N + 1]``, padding being its own document); without it they raise DataError. With
    ``marks_padding``, for a router's loss, every shard marks the tokens that are padding neither of the mask nor of
    this function (``alst_real_tokens``, ``[B, s]`` bool). If positions do not count from 0 in each document, each
    shard has its rank and its batch's fingerprint (``alst_place``).

    Raises:
        DataError: no ``input_ids``; lengths that disagree; a mask or positions that cannot be split.
    """
    whole = _whole_sequences(batch)
    length = _sequence_length(whole)
    # None counts as absent for keys that are made or dropped here.
    common = {key: value for key, value in batch.items() if key not in whole and not (key in _MADE and value is None)}
    if (mask := common.pop("attention_mask", None)) is not None:
        _check_mask(mask, whole, length)
    given = take_bounds(common, length)
    tokens = _tokens_of(whole)
    if "position_ids" not in whole:
        row = torch.arange(length, device=tokens.device) if given is None else positions_within(given)
        whole["position_ids"] = row.expand(tokens.shape[0], length)
    documents = _documents(whole, mask, given, packing, by_lowest)
    if "labels" in whole and "shift_labels" not in whole:
        whole["shift_labels"] = shift_labels(whole["labels"])
    if marks_padding:
        whole[REAL_TOKENS] = _real_tokens(mask, tokens)
    padded = -(-length // multiple) * multiple
    if documents is not None:
        common |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), with_padding(documents, padded))
    pieces = {
        key: _pad(key, x, padded, documents is not None).tensor_split(sp_size, _sequence_dim(key))
        for key, x in whole.items()
    }
    shards = [{key: cut[rank] for key, cut in pieces.items()} for rank in range(sp_size)]
    _stamp(shards, whole, documents)
    return ShardedBatch(shards, common)


def _stamp(
    shards: list[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor], documents: torch.Tensor | None
) -> None:
    """Add rank and batch fingerprint to shards whose positions do not identify them."""
    positions = whole["position_ids"]
    usual = torch.arange(positions.shape[-1]) if documents is None else positions_within(documents)
    if (positions == usual.to(positions.device)).all():
        return
    fingerprint = _fingerprint(_tokens_of(whole), positions)
    for rank, shard in enumerate(shards):
        shard[PLACE] = torch.tensor([rank, fingerprint])


def _documents(
    whole: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    given: torch.Tensor | None,
    packing: bool,
    by_lowest: bool,
) -> torch.Tensor | None:
    """Return the bounds of a batch's packed documents, where transformers would keep them apart.

    Without a mask, transformers reads them from position ids that do not increase by one; for flash attention
    (``by_lowest``), from those that are the lowest.
    """
    # Multi-dimensional ids ([3, B, S]) have the text positions first.
    positions_BS = whole["position_ids"].reshape(-1, *whole["position_ids"].shape[-2:])[0]
    if "seq_idx" in whole:
        check_numbers(whole["seq_idx"], document_starts(positions_BS))
    if whole["position_ids"].dim() > 2:
        check_one_document(positions_BS)
    # transformers drops a mask of ones for flash attention.
    masked = mask is not None and (not by_lowest or bool((mask == 0).any()))
    if masked and packing and given is None and "seq_idx" not in whole:
        return None
    return documents_of(positions_BS, given, len(_tokens_of(whole)), packing, by_lowest)


def uncut(batch: Mapping[str, Any], sp_size: int) -> ShardedBatch:
    """Return the whole batch in place of each shard.

    Raises:
        DataError: it has no tokens.
    """
    _tokens_of(_whole_sequences(batch))
    tensors = {key: x for key, x in batch.items() if isinstance(x, torch.Tensor)}
    return ShardedBatch([tensors] * sp_size, {key: x for key, x in batch.items() if key not in tensors})


def labels_of_all(batch: dict[str, Any]) -> dict[str, Any]:
    """Expand the labels of a batch with ``logits_to_keep`` from the kept tokens to all tokens.

    Raises:
        DataError: the numbers of labels and of kept tokens differ.
    """
    keep = batch.get("logits_to_keep")
    batch = {name: x for name, x in batch.items() if name != "logits_to_keep"}
    if keep is None or (isinstance(keep, int) and keep == 0) or not _has_labels(batch):
        return batch
    tokens = next(batch[key] for key in _LENGTH_KEYS if batch.get(key) is not None)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    places = places[kept_places(keep)]
    key = "shift_labels" if batch.get("shift_labels") is not None else "labels"
    kept = batch[key]
    if kept.shape != (tokens.shape[0], len(places)):
        raise DataError(
            f"{key} has shape {list(kept.shape)}, and logits_to_keep keeps {len(places)} of {tokens.shape[1]} tokens: "
            "give labels to as many, or leave logits_to_keep out"
        )
    shifted = torch.full(tokens.shape[:2], IGNORED_LABEL, dtype=kept.dtype, device=kept.device)
    shifted[:, places.to(kept.device)] = kept if key == "shift_labels" else shift_labels(kept)
    return batch | dict.fromkeys(_LABEL_KEYS, shifted)


def kept_places(keep: Any) -> Any:
    """Return the tokens that transformers' ``logits_to_keep`` selects, as an index."""
    return slice(-keep, None) if isinstance(keep, int) else keep


def _has_labels(batch: Mapping[str, Any]) -> bool:
    return any(batch.get(key) is not None for key in _LABEL_KEYS)


def shift_labels(labels_BS: torch.Tensor) -> torch.Tensor:
    """Shift labels so that each token has the next one's: ``[B, S] -> [B, S]``, none at the end of a row."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED_LABEL)


def _fingerprint(*tensors: torch.Tensor) -> int:
    digest = hashlib.blake2b(digest_size=7)
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return int.from_bytes(digest.digest(), "big")


def _real_tokens(mask_BS: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
    if mask_BS is None:
        return tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
    return (mask_BS != 0).expand(tokens.shape[:2])


def _check_mask(mask_BS: Any, whole: dict[str, torch.Tensor], length: int) -> None:
    """Check that a mask can be dropped: ones, or right padding without labels."""
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
                    f"{key} of row {row} has labels on tokens that attention_mask hides, so the loss would train the "
                    "model to write padding, of which each token sees the sample and no other padding: not available "
                    "under sequence parallelism. Add where the labels are made: "
                    f"labels[attention_mask == 0] = {IGNORED_LABEL}"
                )


def _sequence_dim(key: str) -> int:
    # position_ids may be [S], [B, S] or, for multi-dimensional rotary embeddings, [3, B, S].
    return -1 if key == "position_ids" else 1


def _whole_sequences(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch that have a sequence dim."""
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
        # The highest position may be read as the sequence length, and learned positions are limited.
        counted = torch.arange(missing, dtype=x.dtype, device=x.device).clamp(max=x.max()).expand_as(last)
        return torch.cat([x, counted if packed else last], dim)
    value = IGNORED_LABEL if key in _LABEL_KEYS else 0
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing], value=value)

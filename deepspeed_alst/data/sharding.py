"""Cut one whole batch into P shards. Pure: no process group, no state.

Legend: B batch, S whole sequence, s = S/P one shard, P ranks of a sequence.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.data.validation import (
    LABEL_KEYS,
    Vocabulary,
    check_mask,
    check_numbers,
    document_bounds,
    positions_within,
    take_bounds,
)
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import DataError

REAL_TOKENS = "alst_real_tokens"
"""Key of the mask of tokens that are not padding."""
PLACE = "alst_place"
"""Key of a shard's rank and its batch's fingerprint, ``[2]``, for position ids that do not identify them."""

_IMAGE_AXES = 3
"""Rows of position ids by time, height and width, ``[3, B, S]``, of which transformers reads no packed documents."""
_LENGTH_KEYS = ("input_ids", "inputs_embeds")
_SPLIT_KEYS = (*_LENGTH_KEYS, *LABEL_KEYS, "position_ids")


@dataclass(frozen=True)
class ShardedBatch:
    """Batch in P pieces: ``shards[r]`` has the sequence tensors of rank r, ``common`` is whole on every rank."""

    shards: list[dict[str, torch.Tensor]]
    common: dict[str, Any]


@dataclass(frozen=True)
class ShardingConfig:
    """Form of the shards that a model takes."""

    multiple: int
    """Number of tokens to whose multiples sequences are padded."""
    packing: bool = False
    """True for an attention that separates packed documents: every rank gets the bounds of all of them
    (``cu_seq_lens_q`` and ``_k``, ``[N + 1]``, padding being its own document). Without it they raise DataError."""
    marks_padding: bool = False
    """True to give every shard a mask of its real tokens (``alst_real_tokens``, ``[B, s]`` bool)."""
    by_lowest: bool = False
    """True if packed documents start at the lowest position id, as in flash attention."""
    vocabulary: Vocabulary = field(default_factory=Vocabulary)

    def padded(self, length: int) -> int:
        """Return a sequence's length with its padding."""
        return -(-length // self.multiple) * self.multiple


def shard_batch(batch: Mapping[str, Any], sp_size: int, config: ShardingConfig) -> ShardedBatch:
    """Pad, shift and cut one batch ``[B, S, ...]`` into ``sp_size`` shards ``[B, s, ...]``.

    ``S`` is padded on the right: labels with -100, other tensors with 0, position ids
    with the last one, or after packed documents with a count from 0, at most the sample's highest. ``position_ids`` and
    ``shift_labels`` are created if absent. A mask of ones or right padding is dropped. Everything else goes to every
    rank unchanged.

    If positions do not count from 0 in each document, each shard has its rank and its batch's fingerprint
    (``alst_place``).

    Raises:
        DataError: no ``input_ids``; lengths that disagree; a mask or positions that cannot be split.
    """
    whole, common = _whole_sequences(batch)
    tokens = tokens_of(whole)
    rows, length = tokens.shape[:2]
    mask, given = _take_mask(common, whole), take_bounds(common, length)
    if "position_ids" not in whole:
        row = torch.arange(length, device=tokens.device) if given is None else positions_within(given)
        whole["position_ids"] = row.expand(rows, length)
    documents = _documents(whole, mask, given, config.packing, config.by_lowest)
    if "labels" in whole and "shift_labels" not in whole:
        whole["shift_labels"] = shift_labels(whole["labels"])
    if config.marks_padding:
        real_BS = tokens.new_ones((rows, length), dtype=torch.bool) if mask is None else mask != 0
        whole[REAL_TOKENS] = real_BS.expand(rows, length)
    padded = config.padded(length)
    if documents is not None:
        # The padding is a document of its own, so that no other attends to it.
        end = documents.new_tensor([padded] if padded > length else [])
        common |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), torch.cat([documents, end]))
    pieces = {
        key: _pad(key, x, padded, documents is not None).tensor_split(sp_size, _sequence_dim(key))
        for key, x in whole.items()
    }
    shards = [{key: cut[rank] for key, cut in pieces.items()} for rank in range(sp_size)]
    usual = torch.arange(length) if documents is None else positions_within(documents)
    _stamp(shards, tokens, whole["position_ids"], usual)
    return ShardedBatch(shards, common)


def _stamp(shards: list[dict[str, Any]], tokens: torch.Tensor, positions: torch.Tensor, usual: torch.Tensor) -> None:
    """Add rank and batch fingerprint to shards whose positions do not identify them."""
    if (positions != usual.to(positions.device)).any():
        of_batch = fingerprint(tokens, positions)
        for rank, shard in enumerate(shards):
            shard[PLACE] = torch.tensor([rank, of_batch])


def uncut(batch: Mapping[str, Any], sp_size: int) -> ShardedBatch:
    """Return the whole batch in place of each shard; raise DataError if it is not a mapping."""
    _check_mapping(batch)
    tensors = {key: x for key, x in batch.items() if isinstance(x, torch.Tensor)}
    return ShardedBatch([tensors] * sp_size, {key: x for key, x in batch.items() if key not in tensors})


def tokens_of(batch: Mapping[str, Any]) -> torch.Tensor:
    """Return a batch's tokens, as ids or embeddings."""
    return next(batch[key] for key in _LENGTH_KEYS if batch.get(key) is not None)


def shift_labels(labels_BS: torch.Tensor) -> torch.Tensor:
    """Shift labels so that each token has the next one's: ``[B, S] -> [B, S]``, none at the end of a row."""
    return F.pad(labels_BS[:, 1:], (0, 1), value=IGNORED_LABEL)


def pad_on_the_right(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None]:
    """Move each row's padding from the left to the right, where causal attention does not see it.

    Returns:
        The batch, whose tokens keep their positions, and each row's first token ``[B]``; None if none is padded.

    Raises:
        DataError: the first token of a row has a label, which its padding would have to predict.
    """
    mask_BS = batch.get("attention_mask")
    if not isinstance(mask_BS, torch.Tensor) or mask_BS.dim() != 2:
        return batch, None
    first_B = (mask_BS != 0).to(torch.int8).argmax(dim=1)
    if not first_B.any():
        return batch, None
    S = mask_BS.shape[1]
    moved_BS = torch.arange(S, device=mask_BS.device) + first_B[:, None]
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(S, device=mask_BS.device).expand(mask_BS.shape)
    rows = {key: x for key, x in batch.items() if isinstance(x, torch.Tensor) and x.shape[:2] == mask_BS.shape}
    # Shifted labels have the first token's one place before it.
    for key, at_B in (("shift_labels", first_B - 1),) if "shift_labels" in rows else (("labels", first_B),):
        if (
            key in rows
            and ((rows[key].gather(1, at_B.clamp(min=0)[:, None])[:, 0] != IGNORED_LABEL) & (first_B > 0)).any()
        ):
            raise DataError(
                f"{key} has a label on the first token of a row that is padded on the left: padding would predict it. "
                f"Set it to {IGNORED_LABEL}, or pad on the right"
            )
    padded = {
        key: x.take_along_dim((moved_BS % S).view(*moved_BS.shape, *[1] * (x.dim() - 2)), 1) for key, x in rows.items()
    }
    moved_BS = moved_BS.clamp(max=S - 1)
    moved = moved_BS if positions.dim() == 2 else moved_BS.expand(positions.shape)
    return {**batch, **padded, "position_ids": positions.take_along_dim(moved, -1)}, first_B


def pad_as_before(x_BS: torch.Tensor, first_B: torch.Tensor | None) -> torch.Tensor:
    """Undo ``pad_on_the_right`` in an output, ``[B, S, ...]``, with zeros at padding on the left."""
    if first_B is None:
        return x_BS
    places_BS = torch.arange(x_BS.shape[1], device=x_BS.device) - first_B.to(x_BS.device)[:, None]
    places_BS1 = places_BS.view(*places_BS.shape, *[1] * (x_BS.dim() - 2))
    return x_BS.take_along_dim(places_BS1.clamp(min=0), 1).masked_fill(places_BS1 < 0, 0)


def fingerprint(*tensors: torch.Tensor) -> int:
    """Return 56 bits of a hash of tensors' bytes."""
    digest = hashlib.blake2b(digest_size=7)
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest(), "big")


def _whole_sequences(batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors of a batch that have a sequence dim, checked, and the rest."""
    _check_mapping(batch)
    anchor = next((batch[key] for key in _LENGTH_KEYS if isinstance(batch.get(key), torch.Tensor)), None)
    if anchor is None or anchor.dim() < 2:
        raise DataError(
            "a batch needs input_ids or inputs_embeds of shape [batch, sequence, ...]; got the keys "
            f"{sorted(batch, key=str)}"
        )
    if not anchor.shape[0] or not anchor.shape[1]:
        raise DataError("a batch has no rows, or sequences of length 0; leave out empty batches and documents")
    whole, common = {}, {}
    for key, x in batch.items():
        if x is None and key in (*_SPLIT_KEYS, "attention_mask"):
            continue
        if key in _SPLIT_KEYS and not isinstance(x, torch.Tensor):
            raise DataError(f"{key} must be a tensor, not {type(x).__name__}; convert it in the collate_fn")
        if key == "position_ids" and x.dim() == 1:
            whole[key] = x.expand(anchor.shape[0], -1)
        elif key in _SPLIT_KEYS or (
            isinstance(x, torch.Tensor) and key != "attention_mask" and x.dim() >= 2 and x.shape[:2] == anchor.shape[:2]
        ):
            whole[key] = x
        else:
            common[key] = x
    for key, x in whole.items():
        _check_shape(key, x, anchor)
        if x.dim() != 2 and key in ("input_ids", *LABEL_KEYS):
            raise DataError(f"{key} has shape {list(x.shape)}, and must be [batch, sequence]")
    return whole, common


def _check_mapping(batch: Any) -> None:
    if not isinstance(batch, Mapping):
        raise DataError(
            f"a batch must be a mapping of names to tensors (input_ids, labels, ...), not {type(batch).__name__}; "
            "give the loader a collate_fn that returns a dict"
        )


def _take_mask(common: dict[str, Any], whole: dict[str, torch.Tensor]) -> torch.Tensor | None:
    mask: Any = common.pop("attention_mask", None)
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            raise DataError(f"attention_mask must be a tensor, not {type(mask).__name__}")
        _check_shape("attention_mask", mask, tokens_of(whole))
        check_mask(mask, whole)
    return mask


def _documents(
    whole: dict[str, torch.Tensor],
    mask: torch.Tensor | None,
    given: torch.Tensor | None,
    packing: bool,
    by_lowest: bool,
) -> torch.Tensor | None:
    """Return the bounds of a batch's packed documents, where transformers would keep them apart."""
    positions = whole["position_ids"]
    if positions.dim() == 3 and len(positions) == _IMAGE_AXES:
        return None
    # Multi-dimensional ids ([4, B, S]) have the text positions first, and one document.
    positions_BS = positions.reshape(-1, *positions.shape[-2:])[0]
    if "seq_idx" in whole:
        check_numbers(whole["seq_idx"], positions_BS)
    # transformers drops a mask of ones for flash attention, and reads no documents beside another mask.
    masked = mask is not None and (not by_lowest or bool((mask == 0).any()))
    if masked and packing and given is None and "seq_idx" not in whole and positions.dim() == 2:
        return None
    packing = packing and positions.dim() == 2
    return document_bounds(positions_BS, given, len(tokens_of(whole)), packing, by_lowest)


def _sequence_dim(key: str) -> int:
    # position_ids may be [S], [B, S] or, for multi-dimensional rotary embeddings, [3, B, S].
    return -1 if key in ("position_ids", "attention_mask") else 1


def _check_shape(key: str, x: torch.Tensor, tokens: torch.Tensor) -> None:
    rows, length = tokens.shape[:2]
    if x.dim() < 2 or x.shape[_sequence_dim(key)] != length:
        raise DataError(f"{key} has shape {list(x.shape)}, but the sequences of its batch have {length} tokens")
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
    value = IGNORED_LABEL if key in LABEL_KEYS else 0
    return F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, missing], value=value)

"""Packed documents: several in one row, which must not attend to one another.

They are given by position ids that restart at 0, by the sequence lengths of transformers' and TRL's packing collators
(``cu_seq_lens_q``), or by both; the model gets both. Legend: B batch, S whole sequence, N documents.
"""

from typing import Any

import torch

from deepspeed_alst.data.document_masks import check_one_document, document_bounds
from deepspeed_alst.errors import DataError

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
# Collators add these for flash attention; the longest document is measured again after padding, if needed.
_ARGUMENTS = (*_LENGTHS, "max_length_q", "max_length_k")


def take_bounds(common: dict[str, Any], length: int) -> torch.Tensor | None:
    """Pop a collator's document bounds ``[N + 1]`` from a batch; return None if it has none.

    Raises:
        DataError: they are not the bounds of documents that fill the row, or differ for queries and keys.
    """
    found = {name: common.pop(name) for name in _ARGUMENTS if name in common}
    given = []
    for name in _LENGTHS:
        if (bounds := found.get(name)) is None:
            continue
        if not isinstance(bounds, torch.Tensor) or bounds.dim() != 1 or bounds.is_floating_point() or not len(bounds):
            raise DataError(f"{name} must be one row of whole numbers, the documents' bounds")
        # Signed, so that diff() is negative at a decrease.
        bounds = bounds.long()
        given.append(bounds)
        if bounds[0] != 0 or bounds[-1] != length or (bounds.diff() < 0).any():
            raise DataError(
                f"{name} goes from {int(bounds[0])} to {int(bounds[-1])}: it must rise from 0 to the number of tokens "
                f"in the row, {length}"
            )
        if not torch.equal(bounds, given[0]):
            raise DataError("cu_seq_lens_q and cu_seq_lens_k differ: only attention within a sequence can be split")
    return given[0].unique_consecutive() if given else None


def positions_within(bounds: torch.Tensor) -> torch.Tensor:
    """Return each token's position in its document: ``[N + 1] -> [1, S]``."""
    lengths = bounds.long().diff()
    starts = torch.repeat_interleave(bounds[:-1].long(), lengths)
    return (torch.arange(int(bounds[-1]), device=bounds.device) - starts)[None]


def documents_of(
    position_ids_BS: torch.Tensor, given: torch.Tensor | None, rows: int, packing: bool, by_lowest: bool = False
) -> torch.Tensor | None:
    """Return the bounds ``[N + 1]`` of a batch's documents, int32; None if every row is one document.

    Args:
        position_ids_BS: of the whole sequences; a single row may stand for all.
        given: bounds from the collator, which must be equal.
        rows: number of rows in the batch.
        packing: True if the model's attention keeps documents apart.
        by_lowest: see ``document_bounds``.

    Raises:
        DataError: documents without ``packing``; documents in several rows; position ids that differ from ``given``.
    """
    if not packing:
        check_one_document(position_ids_BS)
    bounds = document_bounds(position_ids_BS, by_lowest)
    if rows > 1 and (bounds is not None or given is not None):
        raise DataError(
            f"packed documents in a batch of {rows} rows (position_ids that do not go on by one): they are kept apart "
            "in a batch of one row only. Pack all of them into one row, or leave position_ids out."
        )
    if given is None:
        return bounds
    found = bounds.to(given) if bounds is not None else given.new_tensor([0, position_ids_BS.shape[1]])
    if not torch.equal(found, given):
        raise DataError(
            f"cu_seq_lens_q has documents that end at {_few(given[1:])}, position_ids some that end at "
            f"{_few(found[1:])}. Leave one of the two out."
        )
    return given.to(torch.int32) if packing else None


def _few(ends: torch.Tensor) -> str:
    shown = ", ".join(str(end) for end in ends[:4].tolist())
    return shown + (", ..." if len(ends) > 4 else "")


def check_numbers(seq_idx_BS: torch.Tensor, starts_BS: torch.Tensor) -> None:
    """Check that ``seq_idx``, the number of each token's document, agrees with the documents' starts.

    Raises:
        DataError: it changes at other tokens.
    """
    changes_BS = torch.zeros_like(starts_BS.expand_as(seq_idx_BS))
    changes_BS[:, 1:] = seq_idx_BS[:, 1:] != seq_idx_BS[:, :-1]
    wrong = (changes_BS != starts_BS).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DataError(
            f"seq_idx {'starts' if changes_BS[row, column] else 'does not start'} a document at token {column} of row "
            f"{row}, position_ids say the opposite. Make them agree, or leave seq_idx out."
        )


def with_padding(bounds: torch.Tensor, padded: int) -> torch.Tensor:
    """Append the padding as a document: the others keep their lengths, and spend no attention on it."""
    return bounds if bounds[-1] == padded else torch.cat([bounds, bounds.new_tensor([padded])])

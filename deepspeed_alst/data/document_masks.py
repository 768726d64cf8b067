"""Mask checks on the whole sample before it is cut. Legend: B batch, S whole sequence."""

import torch

from deepspeed_alst.errors import DataError


def check_padding_mask(mask_BS: torch.Tensor) -> None:
    """Check that causal attention makes a mask redundant: all ones, or zeros on the right only.

    No labelled token attends to padding on the right, so such a mask can be dropped without effect.

    Raises:
        DataError: padding on the left, holes, or a mask that is not ``[B, S]``.
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


def document_starts(position_ids_BS: torch.Tensor) -> torch.Tensor:
    """Mark the starts of documents inside a row: ``[B, S] -> [B, S]`` bool, the first token of a row excluded.

    As in transformers' masks, packed samples are recognized by position ids that do not increase by one.
    """
    starts_BS = torch.zeros_like(position_ids_BS, dtype=torch.bool)
    starts_BS[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return starts_BS


def check_one_document(position_ids_BS: torch.Tensor) -> None:
    """Check that there are no packed samples, whose documents the attention would mix.

    Raises:
        DataError: position ids restart inside a row.
    """
    starts_BS = document_starts(position_ids_BS)
    if starts_BS.any():
        row, column = starts_BS.nonzero()[0].tolist()
        raise DataError(
            f"position_ids restart at token {column} of row {row}: this model does not keep packed samples apart under "
            "sequence parallelism. Give one document per row, or leave position_ids out."
        )


def document_bounds(position_ids_BS: torch.Tensor, by_lowest: bool = False) -> torch.Tensor | None:
    """Return the bounds of the first row's N documents: ``[B, S] -> [N + 1]`` int32; None if no row has several.

    With ``by_lowest`` a document starts at each token with the lowest position, as in transformers' flash attention.

    Raises:
        DataError: with ``by_lowest``, tokens before the first document.
    """
    starts_BS = document_starts(position_ids_BS)
    if by_lowest:
        starts_BS = position_ids_BS == position_ids_BS.amin(dim=1, keepdim=True)
        if not starts_BS[:, 0].all():
            raise DataError(
                "position_ids start higher than their lowest, at which flash attention starts a document: the tokens "
                "before it would be part of none. Start them at the lowest, or leave them out."
            )
        starts_BS[:, 0] = False
    if not starts_BS.any():
        return None
    ends = starts_BS.new_ones(1)
    return torch.cat([ends, starts_BS[0, 1:], ends]).nonzero().flatten().to(torch.int32)

"""What a mask asks for, decided on the whole sample before it is cut. Legend: B batch, S whole sequence."""

import torch

from deepspeed_alst.errors import DataError


def check_padding_mask(mask_BS: torch.Tensor) -> None:
    """Accept a mask that causal attention makes superfluous: all ones, or zeros on the right only.

    Padding on the right is seen by no labelled token, so such a mask can be dropped without changing anything.

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
    """Where a new document starts inside a row: ``[B, S] -> [B, S]`` bool, the first token of a row excluded.

    Packed samples are known by position ids that do not go on by one.
    """
    starts_BS = torch.zeros_like(position_ids_BS, dtype=torch.bool)
    starts_BS[:, 1:] = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    return starts_BS


def check_one_document(position_ids_BS: torch.Tensor) -> None:
    """Refuse packed samples where the attention would let their documents see one another.

    Raises:
        DataError: position ids restart inside a row, or do not start at 0.
    """
    starts_BS = document_starts(position_ids_BS)
    if starts_BS.any():
        row, column = starts_BS.nonzero()[0].tolist()
        raise DataError(
            f"position_ids restart at token {column} of row {row}: this model does not keep packed samples apart under "
            "sequence parallelism. Give one document per row, or leave position_ids out."
        )
    _check_start(position_ids_BS)


def document_bounds(position_ids_BS: torch.Tensor) -> torch.Tensor | None:
    """Where the N documents of the first row start and end: ``[B, S] -> [N + 1]`` int32; None if no row has several.

    Raises:
        DataError: the position ids of a document do not start at 0.
    """
    starts_BS = document_starts(position_ids_BS)
    _check_start(position_ids_BS)
    if not starts_BS.any():
        return None
    if (wrong := starts_BS & (position_ids_BS != 0)).any():
        row, column = wrong.nonzero()[0].tolist()
        raise DataError(
            f"position_ids jump to {int(position_ids_BS[row, column])} at token {column} of row {row}: those of a "
            "packed document must start at 0, and go on by one."
        )
    ends = starts_BS.new_ones(1)
    return torch.cat([ends, starts_BS[0, 1:], ends]).nonzero().flatten().to(torch.int32)


def _check_start(position_ids_BS: torch.Tensor) -> None:
    if (position_ids_BS[:, 0] != 0).any():
        raise DataError(f"position_ids start at {int(position_ids_BS[:, 0].max())}, not at 0. Leave them out.")

"""Buffer format of the head all-to-all, and packing of tensors into it and out of it.

The buffer is ``[P, s, B, W]``: for each rank, token and sample ``h * D`` elements of the first tensor, then of the
next. Kernel and reference use the same format, so they may be mixed across ranks. A tensor is passed as a view of its
pieces, ``[g, s, B, h, D]``: ``by_heads`` of shards, ``by_tokens`` of full sequences. Piece i belongs to the m ranks
``[i*m, (i+1)*m)``: packing writes it m times (shared KV heads), unpacking sums the m in fp32 and rounds once.

Ranks with unequal heads have pieces of different W, one after the other in a flat buffer: see ``pack_uneven``. So do
ranks with a part of the query rows, whose pieces have a block of rows of q and one of k and v.

Triton is imported only where heads are exchanged; without it PyTorch packs.

Legend: P ranks, s tokens of a shard, S = P*s, B batch, H heads, h heads of a rank, D head dim, g pieces, m = P/g; n
elements of a flat buffer.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def by_heads(x_BHsD: torch.Tensor, num_pieces: int) -> torch.Tensor:
    """View sequence shards of all heads as pieces of adjacent heads: ``[B, H, s, D] -> [g, s, B, H/g, D]``."""
    return x_BHsD.unflatten(1, (num_pieces, -1)).permute(1, 3, 0, 2, 4)


def by_tokens(x_BhSD: torch.Tensor, num_pieces: int) -> torch.Tensor:
    """View full sequences as pieces of adjacent tokens: ``[B, h, S, D] -> [g, S/g, B, h, D]``."""
    return x_BhSD.unflatten(2, (num_pieces, -1)).permute(2, 3, 0, 1, 4)


def buffer_shape(pieces: Sequence[torch.Tensor], num_ranks: int) -> tuple[int, int, int, int]:
    """Return ``P, s, B, W`` of the buffer for these pieces."""
    return num_ranks, *pieces[0].shape[1:3], sum(x.shape[3] * x.shape[4] for x in pieces)


def _parts(buffer_PsBW: torch.Tensor, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of each tensor's pieces in the buffer: ``[g, m, s, B, h, D]``."""
    parts, first = [], 0
    for x_gsBhD in pieces:
        g, h, D = x_gsBhD.shape[0], *x_gsBhD.shape[3:]
        part_PsBhD = buffer_PsBW[..., first : first + h * D].unflatten(-1, (h, D))
        parts.append(part_PsBhD.unflatten(0, (g, -1)))
        first += h * D
    return parts


def pack_reference(pieces: Sequence[torch.Tensor], num_ranks: int) -> torch.Tensor:
    """Compute ``pack`` in PyTorch, as reference and fallback."""
    buffer_PsBW = pieces[0].new_empty(buffer_shape(pieces, num_ranks))
    for x_gsBhD, part in zip(pieces, _parts(buffer_PsBW, pieces), strict=True):
        part.copy_(x_gsBhD.unsqueeze(1))
    return buffer_PsBW


def unpack_reference(buffer_PsBW: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    """Compute ``unpack_`` in PyTorch, as reference and fallback; fp64 is summed in fp64."""
    sum_dtype = torch.promote_types(buffer_PsBW.dtype, torch.float32)
    for x_gsBhD, part in zip(pieces, _parts(buffer_PsBW, pieces), strict=True):
        x_gsBhD.copy_(part[:, 0] if part.shape[1] == 1 else part.sum(1, dtype=sum_dtype))


@functools.cache
def _kernel_picker() -> Callable[..., Any] | None:
    """Return ``registry.pick``, or None if Triton is not installed."""
    try:
        import deepspeed_alst.kernels.pack_heads  # noqa: F401
        from deepspeed_alst.kernels.registry import pick
    except ImportError:
        return None
    return pick


def _run(name: str, reference: Callable[..., Any], x: torch.Tensor, pieces: Sequence[torch.Tensor], *args: Any) -> Any:
    """Call the kernel if it supports the pieces and their device, else the reference."""
    usable = x.dtype in _DTYPES and all(y.dtype == x.dtype and (y.shape[4] < 2 or y.stride(4) == 1) for y in pieces)
    pick = _kernel_picker() if usable else None
    return (pick(name, x) if pick else reference)(*args)


def pack(pieces: Sequence[torch.Tensor], num_ranks: int) -> torch.Tensor:
    """Pack up to three tensors into the send buffer of an all-to-all: ``[g, s, B, h, D] -> [P, s, B, W]``.

    One pass over memory; a single tensor whose pieces already have the buffer's layout is returned as a view.

    Args:
        pieces: any strides; bf16, fp16 and fp32 use a kernel if the D elements of a head are contiguous. The buffer has
            the dtype of the first tensor: under autocast RoPE leaves q and k in fp32, and v in bf16.
        num_ranks: P, a multiple of each g.
    """
    first = pieces[0]
    if len(pieces) == 1 and first.shape[0] == num_ranks and first.is_contiguous():
        return first.flatten(3)
    return _run("pack_heads", pack_reference, first, pieces, list(pieces), num_ranks)


def unpack_(buffer_PsBW: torch.Tensor, pieces: Sequence[torch.Tensor]) -> None:
    """Unpack the receive buffer of an all-to-all into up to three tensors, in one pass: ``[P, s, B, W]``.

    Args:
        buffer_PsBW: contiguous.
        pieces: output views ``[g, s, B, h, D]``. If g < P, each piece is the sum of P/g ranks' pieces in fp32, rounded
            once.
    """
    _run("unpack_heads_", unpack_reference, buffer_PsBW, pieces, buffer_PsBW, list(pieces))


# --- ranks with unequal heads or rows


class Share(NamedTuple):
    """Adjacent heads that a rank has of a tensor, and its rows of each shard; other ranks may have the same."""

    heads: range
    rows: tuple[range, ...]


Shares = Sequence[Share]
"""Each rank's share of a tensor."""


def blocks(head_dims: Sequence[int], shares: Sequence[Share]) -> list[tuple[int, list[int]]]:
    """Return the blocks of a rank's piece, given its share of each tensor: rows, and the tensors' elements of a row.

    Adjacent tensors with the same rows are one block, which has all of a row's elements side by side.
    """
    found = []
    pairs = zip(head_dims, shares, strict=True)
    for rows, of_rows in itertools.groupby(pairs, key=lambda pair: pair[1].rows):
        found.append((sum(map(len, rows)), [D * len(share.heads) for D, share in of_rows]))
    return found


def uneven_sizes(batch_size: int, head_dims: Sequence[int], shares: Sequence[Shares]) -> list[int]:
    """Return the elements of each rank's piece of a flat buffer, with the shares of each tensor."""
    of_ranks = zip(*shares, strict=True)
    return [sum(batch_size * n * sum(widths) for n, widths in blocks(head_dims, each)) for each in of_ranks]


def _uneven_parts(
    buffer_n: torch.Tensor, batch_size: int, head_dims: Sequence[int], shares: Sequence[Shares]
) -> list[list[torch.Tensor]]:
    """Return views of a flat buffer, for each tensor and rank: ``[rows, B, h, D]``."""
    pieces, of_ranks = buffer_n.split(uneven_sizes(batch_size, head_dims, shares)), list[list[torch.Tensor]]()
    for piece_n, of_rank in zip(pieces, zip(*shares, strict=True), strict=True):
        layout = blocks(head_dims, of_rank)
        found = piece_n.split([batch_size * n * sum(widths) for n, widths in layout])
        parts = [
            part
            for block_n, (n, widths) in zip(found, layout, strict=True)
            for part in block_n.view(n, batch_size, sum(widths)).split(widths, dim=-1)
        ]
        of_ranks.append([part.unflatten(-1, (-1, D)) for part, D in zip(parts, head_dims, strict=True)])
    return [list(parts) for parts in zip(*of_ranks, strict=True)]


def pack_uneven(tensors_BHsD: Sequence[torch.Tensor], shares: Sequence[Shares]) -> tuple[torch.Tensor, list[int]]:
    """Pack tensors for ranks with unequal shares: ``[B, H, s, D]`` to a flat buffer, and its elements per rank.

    A rank's piece is ``[s, B, W]`` as in ``pack``, with a W of its own, and if tensors have different rows one such
    block for each of these (``blocks``). It is a copy per rank and tensor.
    """
    B, head_dims = tensors_BHsD[0].shape[0], [x.shape[3] for x in tensors_BHsD]
    sizes = uneven_sizes(B, head_dims, shares)
    buffer_n = tensors_BHsD[0].new_empty(sum(sizes))
    for x_BHsD, *of_ranks in zip(tensors_BHsD, shares, _uneven_parts(buffer_n, B, head_dims, shares), strict=True):
        for share, part_nBhD in zip(*of_ranks, strict=True):
            x_sBhD = x_BHsD[:, share.heads.start : share.heads.stop].permute(2, 0, 1, 3)
            for rows, part in zip(share.rows, part_nBhD.split([*map(len, share.rows)]), strict=True):
                part.copy_(x_sBhD[rows.start : rows.stop])
    return buffer_n, sizes


def unpack_uneven_(buffer_n: torch.Tensor, tensors_BHsD: Sequence[torch.Tensor], shares: Sequence[Shares]) -> None:
    """Unpack what ranks with unequal shares have sent into ``[B, H, s, D]``, by ``merge_heads_``."""
    B, head_dims = tensors_BHsD[0].shape[0], [x.shape[3] for x in tensors_BHsD]
    for x_BHsD, *of_ranks in zip(tensors_BHsD, shares, _uneven_parts(buffer_n, B, head_dims, shares), strict=True):
        by_rows: dict[range, tuple[list[range], list[torch.Tensor]]] = {}
        for share, part_nBhD in zip(*of_ranks, strict=True):
            for rows, part in zip(share.rows, part_nBhD.split([*map(len, share.rows)]), strict=True):
                of_rows = by_rows.setdefault(rows, ([], []))
                of_rows[0].append(share.heads)
                of_rows[1].append(part)
        for rows, of_rows in by_rows.items():
            merge_heads_(x_BHsD[:, :, rows.start : rows.stop], *of_rows)


def merge_heads_(x_BHsD: torch.Tensor, split: Sequence[range], parts_sBhD: Sequence[torch.Tensor]) -> None:
    """Fill a tensor from each rank's heads of it; those of several ranks are summed in fp32 and rounded once."""
    sum_dtype = torch.promote_types(x_BHsD.dtype, torch.float32)
    bounds = sorted({bound for heads in split for bound in (heads.start, heads.stop)})
    for first, last in itertools.pairwise(bounds):
        found = [
            part_sBhD[:, :, first - heads.start : last - heads.start]
            for heads, part_sBhD in zip(split, parts_sBhD, strict=True)
            if first in heads
        ]
        total = found[0] if len(found) == 1 else functools.reduce(torch.add, (x.to(sum_dtype) for x in found))
        x_BHsD[:, first:last].permute(2, 0, 1, 3).copy_(total)

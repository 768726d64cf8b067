"""Exact averaging of gradients over ranks, sent in the gradients' own dtype, in slices of bounded memory.

A rank receives the P pieces of its share of a slice, adds them in fp32, and divides once. Sums go on to their owners
(ZeRO 1, 2) or to all ranks (ZeRO 0). Each step sends and receives at most n * (P-1)/P elements a rank.
Legend: P ranks, n elements of a slice, m of a rank's share of it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces

# Elements: aligns pieces for the 16-byte loads of a GPU.
_ALIGNED = 16


@dataclass(frozen=True)
class Segment:
    """Elements or columns ``[start, stop)`` of one gradient, from ``at`` on in a slice or a rank's share of it."""

    index: int
    start: int
    stop: int
    at: int

    @property
    def width(self) -> int:
        """Number of elements."""
        return self.stop - self.start


def segments(sizes: Sequence[int], width: int) -> Iterator[list[Segment]]:
    """Yield slices of at most ``width`` elements that hold all gradients in order."""
    filled: list[Segment] = []
    used = 0
    for index, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + width - used)
            filled.append(Segment(index, start, stop, used))
            used += stop - start
            start = stop
            if used == width:
                yield filled
                filled, used = [], 0
    if filled:
        yield filled


def pieces_by_owner(
    parts: Sequence[Segment], owners: Sequence[int], share: int, num_ranks: int
) -> list[list[list[Segment]]]:
    """Cut a slice into shares of ``share`` elements: ``[p][q]`` lists the segments of rank p's that rank q owns.

    ``owners`` holds the rank of each gradient.
    """
    owned: list[list[list[Segment]]] = [[[] for _ in range(num_ranks)] for _ in range(num_ranks)]
    for rank, pieces in enumerate(segments([part.width for part in parts], share)):
        for piece in pieces:
            part = parts[piece.index]
            start, stop = part.start + piece.start, part.start + piece.stop
            owned[rank][owners[part.index]].append(Segment(part.index, start, stop, piece.at))
    return owned


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a bucket that one rank owns."""

    numel: int
    owner: int
    out: torch.Tensor | None = None  # fp32 partition of the owner, to add to; None: in place in the bucket


@dataclass(frozen=True)
class Reduction:
    """Averaging of gradients, of the same sizes in the same order on all ranks.

    With ``dtype`` fp32, gradients are sent in their own dtype and added in fp32; with bf16 or fp16, they are sent and
    added in that dtype. Extra memory is at most twice ``slice_bytes``: one slice and its received pieces.
    """

    dtype: torch.dtype = torch.float32
    slice_bytes: int = 2**26

    def on_wire(self, dtype: torch.dtype) -> torch.dtype:
        """Return the wire dtype of gradients of a dtype, or of sums that are to end in it."""
        return dtype if self.dtype == torch.float32 else self.dtype

    def reduce_scatter(
        self,
        grads: Sequence[torch.Tensor],
        place: Callable[[int], torch.Tensor],
        accumulate: bool,
        group: dist.ProcessGroup,
    ) -> Iterator[torch.Tensor]:
        """Average gradients and shard each over the ranks: ``[r*c, (r+1)*c)`` to rank r, c = ceil(n/P).

        ``place(i)`` returns the 1-D output of c elements for the share of gradient i, called when its first sums are
        ready. Elements past the end of the gradient are set to zero. ``accumulate`` adds to the output, in its dtype.

        Yields:
            Each gradient's share in turn; the gradient is no longer read.
        """
        P = dist.get_world_size(group)
        columns = [math.ceil(grad.numel() / P) for grad in grads]
        wire = self.on_wire(_widest(grads))
        # Sums that are added in 16 bits are rounded first, into one more buffer.
        width = self._share((2 * P + accumulate) * wire.itemsize, sum(columns))
        scratch = grads[0].new_empty(2 * P * width * wire.itemsize, dtype=torch.uint8)
        num_placed = 0
        for parts in segments(columns, width):
            m = parts[-1].at + parts[-1].width
            send_Pm = _view(scratch, 0, P * m, wire).view(P, m)
            for part in parts:
                _fill(send_Pm[:, part.at : part.at + part.width], grads[part.index], part.start, columns[part.index])
            pieces_Pm, scale = self._exchange(send_Pm, scratch, 1 / P, group)
            for part in parts:
                if part.start == 0:
                    yield from map(place, range(num_placed, part.index))  # gradients without elements
                    out, num_placed = place(part.index), part.index + 1
                _put(pieces_Pm[:, part.at : part.at + part.width], out[part.start : part.stop], scale, accumulate)
                if part.stop == columns[part.index]:
                    yield out
        yield from map(place, range(num_placed, len(grads)))

    def reduce_to_owners(
        self, bucket_n: torch.Tensor, fragments: Sequence[Fragment], dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        """Average a bucket, which is all ``fragments`` in turn, and send each owner its fragments as ``dtype``."""
        P, r = dist.get_world_size(group), dist.get_rank(group)
        wire, sums = self.on_wire(bucket_n.dtype), self.on_wire(dtype)
        # First the sent slice and its pieces, or their sum; then a share sorted by owner, and the fragments received.
        of_pieces = (2 * P if self.dtype == torch.float32 else P + 1) * wire.itemsize
        region = max(of_pieces, (1 + P) * sums.itemsize)
        flat, owners = bucket_n.split([each.numel for each in fragments]), [each.owner for each in fragments]
        for parts, mine_m, scratch in self._sums(flat, 1 / P, sums, region, group):
            owned = pieces_by_owner(parts, owners, mine_m.numel(), P)
            to_get = [piece for of_rank in owned for piece in of_rank[r]]
            received = _to_owners(mine_m, owned, scratch, group).split([piece.width for piece in to_get])
            for piece, sums_of_piece in zip(to_get, received, strict=True):
                out = fragments[piece.index].out
                if out is None:
                    flat[piece.index][piece.start : piece.stop].copy_(sums_of_piece)
                else:
                    # Not add_, which on CPU first copies its operand if the dtypes differ.
                    sum_pieces(sums_of_piece[None], out[piece.start : piece.stop], 1.0, accumulate=True)

    def all_reduce(
        self, grads: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], divisor: float, group: dist.ProcessGroup
    ) -> None:
        """Average flat gradients (their sum over ``divisor``) on every rank, into ``outs``, which may be the same."""
        P = dist.get_world_size(group)
        wire, sums = self.on_wire(_widest(grads)), self.on_wire(_widest(outs))
        region = max(2 * P * wire.itemsize, P * sums.itemsize)
        for parts, mine_m, scratch in self._sums(grads, 1 / divisor, sums, region, group):
            all_n = _view(scratch, 0, P * mine_m.numel(), sums)
            dist.all_gather_single(all_n, mine_m, group=group)
            for part in parts:
                outs[part.index][part.start : part.stop].copy_(all_n[part.at : part.at + part.width])

    def _sums(
        self, grads: Sequence[torch.Tensor], scale: float, dtype: torch.dtype, region: int, group: dist.ProcessGroup
    ) -> Iterator[tuple[list[Segment], torch.Tensor, torch.Tensor]]:
        """Yield each slice of flat gradients with this rank's share of its sums, ``[m]``, and the memory around it.

        ``region`` is the size of that memory in bytes per element of the share.
        """
        P, wire = dist.get_world_size(group), self.on_wire(_widest(grads))
        share = self._share(region + dtype.itemsize, math.ceil(sum(grad.numel() for grad in grads) / P))
        scratch = grads[0].new_empty(share * (region + dtype.itemsize), dtype=torch.uint8)
        for parts in segments([grad.numel() for grad in grads], P * share):
            n = parts[-1].at + parts[-1].width
            m = math.ceil(n / P)
            send_n = _view(scratch, 0, P * m, wire)
            torch.cat([grads[part.index][part.start : part.stop] for part in parts], out=send_n[:n])
            send_n[n:].zero_()
            mine_m = _view(scratch, share * region, m, dtype)
            pieces_Pm, factor = self._exchange(send_n.view(P, m), scratch, scale, group)
            sum_pieces(pieces_Pm, mine_m, factor)
            yield parts, mine_m, scratch

    def _share(self, bytes_per_element: int, most: int) -> int:
        """Return the elements of a rank's share of a slice, given the extra bytes per element on this rank."""
        share = min(2 * self.slice_bytes // bytes_per_element, -(-most // _ALIGNED) * _ALIGNED)
        return max(1, share - share % _ALIGNED if share > _ALIGNED else share)

    def _exchange(
        self, send_Pm: torch.Tensor, scratch: torch.Tensor, scale: float, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, float]:
        """Return this rank's pieces, behind the sent ones in the scratch, and the remaining factor of their sum.

        If the wire adds, there is one piece, and the sent tensor is overwritten.
        """
        P, m = send_Pm.shape
        if self.dtype == torch.float32:
            received_Pm = _view(scratch, send_Pm.nbytes, P * m, send_Pm.dtype).view(P, m)
            dist.all_to_all_single(received_Pm, send_Pm, group=group)
            return received_Pm, scale
        # Scale before the sum, as DeepSpeed does: 16 bits overflow early.
        send_Pm.mul_(scale)
        sum_1m = _view(scratch, send_Pm.nbytes, m, send_Pm.dtype).view(1, m)
        dist.reduce_scatter_single(sum_1m, send_Pm, group=group)
        return sum_1m, 1.0


def _view(scratch: torch.Tensor, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Return ``numel`` elements from byte ``start`` on of the one buffer that all slices of a call share."""
    return scratch[start : start + numel * dtype.itemsize].view(dtype)


def _fill(send_Pw: torch.Tensor, grad: torch.Tensor, start: int, num_columns: int) -> None:
    """Copy columns from ``start`` of a gradient laid out as [P, num_columns], with zeros past its end."""
    P, width = send_Pw.shape
    flat_n = grad.reshape(-1)
    whole = flat_n.numel() // num_columns
    rows = flat_n[: whole * num_columns].view(whole, num_columns)
    send_Pw[:whole].copy_(rows[:, start : start + width])
    if whole < P:
        rest = flat_n[whole * num_columns + start : whole * num_columns + start + width]
        send_Pw[whole:].zero_()
        send_Pw[whole, : rest.numel()].copy_(rest)


def _put(pieces_Pw: torch.Tensor, out_w: torch.Tensor, scale: float, accumulate: bool) -> None:
    """Sum pieces into an output, or round the sum to its dtype and add it, as DeepSpeed does."""
    if accumulate and out_w.dtype != torch.float32:
        rounded_w = torch.empty_like(out_w)
        sum_pieces(pieces_Pw, rounded_w, scale)
        out_w.add_(rounded_w)
    else:
        sum_pieces(pieces_Pw, out_w, scale, accumulate)


def _to_owners(
    mine_m: torch.Tensor, owned: list[list[list[Segment]]], scratch: torch.Tensor, group: dist.ProcessGroup
) -> torch.Tensor:
    """Send each rank what it owns of this rank's share; return what this rank owns, share by share."""
    r = dist.get_rank(group)
    to_send = [sum(piece.width for piece in pieces) for pieces in owned[r]]
    to_get = [sum(piece.width for piece in of_rank[r]) for of_rank in owned]
    send = _view(scratch, 0, sum(to_send), mine_m.dtype)
    if send.numel():
        torch.cat([mine_m[each.at : each.at + each.width] for pieces in owned[r] for each in pieces], out=send)
    received = _view(scratch, send.nbytes, sum(to_get), mine_m.dtype)
    dist.all_to_all_single(received, send, to_get, to_send, group=group)
    return received


def _widest(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})

"""Exact gradient reduction over ranks, sent in the gradients' own dtype, in slices of bounded memory.

Gradients are sent without conversion. Each slice is split evenly over the ranks, whoever owns its elements; a rank
receives all P pieces of its share, adds them in fp32 and divides once, after the sum. The next step depends on the
ZeRO stage: none where the share belongs to its owner (ZeRO 3), a second exchange to the owners (ZeRO 1, 2), or an
all-gather (ZeRO 0).

In each step a rank sends and receives at most n * (P-1)/P elements. Sending the pieces directly to the owners of ZeRO
1 and 2 would save a step, but a bucket belongs to one or two ranks, whose links all pieces would share.

Legend: P ranks, n elements of a bucket, m of a rank's share of a slice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sums

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_alst.grad_reduction.bucket_layout import Piece, pieces_by_owner, segments
from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces

# Elements: aligns pieces for the 16-byte loads of a GPU.
_ALIGNED = 16


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a bucket that one rank owns."""

    numel: int
    owner: int
    out: torch.Tensor | None = None
    """Tensor of the owner to add them to; None: in place in the bucket."""


@dataclass(frozen=True)
class Reduction:
    """Averaging of gradients over ranks.

    With ``dtype`` fp32, gradients are sent in their own dtype and added in fp32; with bf16 or fp16, they are sent and
    added in that dtype. Extra memory is at most twice ``slice_bytes``: one slice and its received pieces.
    """

    dtype: torch.dtype = torch.float32
    slice_bytes: int = 2**26

    def on_wire(self, dtype: torch.dtype) -> torch.dtype:
        """Return the wire dtype of gradients of a dtype, or of sums that are to end in it."""
        return dtype if self.dtype == torch.float32 else self.dtype

    def shard(
        self,
        grads: Sequence[torch.Tensor],
        place: Callable[[int], torch.Tensor],
        accumulate: bool,
        group: dist.ProcessGroup,
    ) -> Iterator[torch.Tensor]:
        """Average gradients and shard each over the ranks: ``[r*c, (r+1)*c)`` to rank r, c = ceil(n/P).

        Args:
            grads: any shapes; the same number, order and sizes on all ranks.
            place: returns the 1-D output of c elements for the share of gradient i, called when its first sums are
                ready. Elements past the end of the gradient are set to zero.
            accumulate: True to add to the output, in its dtype.
            group: the ranks.

        Yields:
            Each gradient's share in turn, in its output; the gradient is no longer read.
        """
        P = dist.get_world_size(group)
        columns = [math.ceil(grad.numel() / P) for grad in grads]
        wire = self.on_wire(_widest(grads))
        # Sums that are added in 16 bits are rounded first, into one more buffer.
        width = self._share((2 * P + accumulate) * wire.itemsize, sum(columns))
        scratch = _Scratch(grads[0], 2 * P * width * wire.itemsize)
        outs: dict[int, torch.Tensor] = {}
        done = 0
        for parts in segments(columns, width):
            m = parts[-1].at + parts[-1].width
            send_Pm = scratch.take(0, P * m, wire).view(P, m)
            for part in parts:
                _fill(send_Pm[:, part.at : part.at + part.width], grads[part.index], part.start, columns[part.index])
            pieces_Pm, scale = self._exchange(send_Pm, scratch, send_Pm.nbytes, 1 / P, group)
            for part in parts:
                if part.index not in outs:
                    outs[part.index] = place(part.index)
                out = outs[part.index][part.start : part.stop]
                _put(pieces_Pm[:, part.at : part.at + part.width], out, scale, accumulate)
            # The last gradient of a slice may continue in the next one.
            finished = parts[-1].index + (parts[-1].stop == columns[parts[-1].index])
            for index in range(done, finished):
                yield outs.pop(index) if index in outs else place(index)
            done = finished
        yield from map(place, range(done, len(grads)))

    def to_owners(
        self, bucket_n: torch.Tensor, fragments: Sequence[Fragment], dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        """Average a bucket and send each owner its fragments as ``dtype``; the rest of the bucket is overwritten."""
        P, r = dist.get_world_size(group), dist.get_rank(group)
        bounds = [0, *running_sums(fragment.numel for fragment in fragments)]
        owners = [fragment.owner for fragment in fragments]
        wire, sums = self.on_wire(bucket_n.dtype), self.on_wire(dtype)
        # First the pieces (if the wire adds: the sent slice and the sum); then this rank's share sorted by owner, and
        # the fragments it receives. The summed share needs memory beside both.
        of_pieces = (P if self.dtype == torch.float32 else P + 1) * wire.itemsize
        region = max(of_pieces, (1 + P) * sums.itemsize)
        share = self._share(region + sums.itemsize, math.ceil(bucket_n.numel() / P))
        scratch = _Scratch(bucket_n, share * (region + sums.itemsize))
        stop = 0
        while stop < bucket_n.numel():
            start, stop = stop, _slice_end(stop, bucket_n.numel(), P * share, P)
            m = math.ceil((stop - start) / P)
            mine_m = scratch.take(share * region, m, sums)
            self._sum_share(bucket_n[start:stop], mine_m, scratch, 1 / P, group)
            shares = [(start + p * m, min(stop, start + (p + 1) * m)) for p in range(P)]
            owned = [pieces_by_owner(bounds, owners, first, last, P) for first, last in shares]
            for piece, sums_of_piece in _hand_over(mine_m, shares[r][0], owned, scratch, group):
                fragment = fragments[piece.fragment]
                if fragment.out is None:
                    bucket_n[piece.start : piece.stop].copy_(sums_of_piece)
                else:
                    offset = piece.start - bounds[piece.fragment]
                    out = fragment.out[offset : offset + piece.numel]
                    # Not add_, which on CPU first copies its operand if the dtypes differ.
                    sum_pieces(sums_of_piece[None], out, 1.0, accumulate=True)

    def everywhere(
        self, grads: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], divisor: float, group: dist.ProcessGroup
    ) -> None:
        """Average flat gradients (their sum over ``divisor``) on every rank, into ``outs``, which may be the same."""
        P = dist.get_world_size(group)
        wire, sums = self.on_wire(_widest(grads)), self.on_wire(_widest(outs))
        region = max(2 * P * wire.itemsize, P * sums.itemsize)
        share = self._share(region + sums.itemsize, math.ceil(sum(grad.numel() for grad in grads) / P))
        scratch = _Scratch(grads[0], share * (region + sums.itemsize))
        for parts in segments([grad.numel() for grad in grads], P * share):
            n = parts[-1].at + parts[-1].width
            m = math.ceil(n / P)
            send_n = scratch.take(0, P * m, wire)
            for part in parts:
                send_n[part.at : part.at + part.width].copy_(grads[part.index][part.start : part.stop])
            send_n[n:].zero_()
            mine_m = scratch.take(share * region, m, sums)
            pieces_Pm, scale = self._exchange(send_n.view(P, m), scratch, send_n.nbytes, 1 / divisor, group)
            sum_pieces(pieces_Pm, mine_m, scale)
            all_n = scratch.take(0, P * m, sums)
            dist.all_gather_into_tensor(all_n, mine_m, group=group)
            for part in parts:
                outs[part.index][part.start : part.stop].copy_(all_n[part.at : part.at + part.width])

    def _share(self, bytes_per_element: int, most: int) -> int:
        """Return the elements of a rank's share of a slice, given the extra bytes per element on this rank."""
        share = min(2 * self.slice_bytes // bytes_per_element, -(-most // _ALIGNED) * _ALIGNED)
        return max(1, share - share % _ALIGNED if share > _ALIGNED else share)

    def _sum_share(
        self, slice_n: torch.Tensor, mine_m: torch.Tensor, scratch: "_Scratch", scale: float, group: dist.ProcessGroup
    ) -> None:
        """Sum this rank's share of a slice: ``[n] -> [m]``, m = ceil(n/P)."""
        P, m, wire = dist.get_world_size(group), mine_m.numel(), self.on_wire(slice_n.dtype)
        if padding := P * m - slice_n.numel():
            slice_n = F.pad(slice_n, (0, padding))
        copied = 0
        if self.dtype != torch.float32:
            slice_n = scratch.take(0, P * m, wire).copy_(slice_n)
            copied = slice_n.nbytes
        pieces_Pm, scale = self._exchange(slice_n.view(P, m), scratch, copied, scale, group)
        sum_pieces(pieces_Pm, mine_m, scale)

    def _exchange(
        self, send_Pm: torch.Tensor, scratch: "_Scratch", start: int, scale: float, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, float]:
        """Return this rank's pieces, in the scratch from byte ``start`` on, and the remaining factor of their sum.

        If the wire adds, there is one piece, and the sent tensor is overwritten.
        """
        P, m = send_Pm.shape
        if self.dtype == torch.float32:
            received_Pm = scratch.take(start, P * m, send_Pm.dtype).view(P, m)
            dist.all_to_all_single(received_Pm, send_Pm, group=group)
            return received_Pm, scale
        # Scale before the sum, as DeepSpeed does: 16 bits overflow early.
        send_Pm.mul_(scale)
        sum_1m = scratch.take(start, m, send_Pm.dtype).view(1, m)
        dist.reduce_scatter_tensor(sum_1m, send_Pm, group=group)
        return sum_1m, 1.0


class _Scratch:
    """One buffer for all slices of a call, so that collectives of earlier slices hold no extra memory."""

    def __init__(self, like: torch.Tensor, num_bytes: int) -> None:
        self._bytes = like.new_empty(num_bytes, dtype=torch.uint8)

    def take(self, start: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a view of ``numel`` elements from byte ``start`` on."""
        return self._bytes[start : start + numel * dtype.itemsize].view(dtype)


def _slice_end(start: int, end: int, numel: int, num_ranks: int) -> int:
    """Return the end of the slice starting at ``start``; the uneven rest is last and alone, as padding copies."""
    rest = min(end - start, numel)
    return start + (rest - rest % num_ranks if rest > num_ranks else rest)


def _fill(send_Pw: torch.Tensor, grad: torch.Tensor, start: int, num_columns: int) -> None:
    """Copy columns from ``start`` of a gradient laid out as [P, num_columns], with zeros past its end."""
    P, width = send_Pw.shape
    flat_n = grad.reshape(-1)
    whole = min(P, flat_n.numel() // num_columns)
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


def _hand_over(
    mine_m: torch.Tensor, first: int, owned: list[list[list[Piece]]], scratch: _Scratch, group: dist.ProcessGroup
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Send each rank the parts it owns of this rank's share; yield this rank's pieces of all shares.

    Args:
        mine_m: the share, whose first element is element ``first`` of the bucket.
        first: see above.
        owned: ``owned[p][q]`` lists the pieces of rank p's share that rank q owns.
        scratch: holds the send and receive buffers, from its start.
        group: the ranks.
    """
    r = dist.get_rank(group)
    to_send = [piece for pieces in owned[r] for piece in pieces]
    send = scratch.take(0, sum(piece.numel for piece in to_send), mine_m.dtype)
    if to_send:
        torch.cat([mine_m[piece.start - first : piece.stop - first] for piece in to_send], out=send)
    to_get = [piece for of_rank in owned for piece in of_rank[r]]
    received = scratch.take(send.nbytes, sum(piece.numel for piece in to_get), mine_m.dtype)
    dist.all_to_all_single(
        received,
        send,
        [sum(piece.numel for piece in of_rank[r]) for of_rank in owned],
        [sum(piece.numel for piece in pieces) for pieces in owned[r]],
        group=group,
    )
    yield from zip(to_get, received.split([piece.numel for piece in to_get]), strict=True)


def _widest(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype

"""Sums of gradients over ranks: exact at the wire price of the gradients' own dtype, in slices of bounded memory.

The gradients are sent as they are. Each slice is split evenly over the ranks, whoever owns its elements; a rank gets
all P pieces of its share, adds them in fp32 and divides once, after the sum. What follows depends on who needs the
sums: nothing more where the share is the owner's (ZeRO 3), a second exchange to the owners (ZeRO 1, 2), or an
all-gather (ZeRO 0).

A rank sends, and gets, at most n * (P-1)/P elements for each of these steps. Sending the pieces straight to the owners
of ZeRO 1 and 2 would save a step, but a bucket belongs to one or two ranks, and all the others' pieces would go through
their links alone.

Legend: P ranks, n elements of a bucket, m of a rank's share of a slice.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate as running_sums
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_alst.ops.sum_pieces import sum_pieces
from deepspeed_alst.parallel.slices import Piece, pieces_by_owner, segments


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a bucket that one rank owns."""

    numel: int
    owner: int
    out: torch.Tensor | None = None
    """Where the owner wants them added; None: in their place in the bucket."""


@dataclass(frozen=True)
class Reduction:
    """How gradients are averaged over ranks.

    With ``dtype`` fp32 they travel in their own dtype and are added in fp32; with bf16 or fp16 they travel and are
    added in that. The memory beyond the gradients is at most twice ``slice_bytes``: one slice and its received pieces.
    """

    dtype: torch.dtype = torch.float32
    slice_bytes: int = 2**26

    def on_wire(self, dtype: torch.dtype) -> torch.dtype:
        """What gradients of a dtype, or sums that are to end in it, are sent in."""
        return dtype if self.dtype == torch.float32 else self.dtype

    def shard(
        self,
        grads: Sequence[torch.Tensor],
        place: Callable[[int], torch.Tensor],
        accumulate: bool,
        group: dist.ProcessGroup,
    ) -> Iterator[torch.Tensor]:
        """Average gradients and give each rank its share of each: ``[r*c, (r+1)*c)`` to rank r, c = ceil(n/P).

        Args:
            grads: the same on all ranks in number, order and sizes; any shapes.
            place: where the share of gradient i goes, 1-D of c elements; asked when its first sums are there. Past the
                end of the gradient it becomes zero.
            accumulate: add to what is in that place, in its dtype.
            group: the ranks.

        Yields:
            Each gradient's share in turn, in its place; the gradient is no longer read.
        """
        P = dist.get_world_size(group)
        columns = [math.ceil(grad.numel() / P) for grad in grads]
        wire = self.on_wire(_widest(grads))
        outs: dict[int, torch.Tensor] = {}
        done = 0
        for parts in segments(columns, self._share(2 * P * wire.itemsize)):
            send_Pm = grads[0].new_empty(P, parts[-1].at + parts[-1].width, dtype=wire)
            for part in parts:
                _fill(send_Pm[:, part.at : part.at + part.width], grads[part.index], part.start, columns[part.index])
            pieces_Pm, scale = self._exchange(send_Pm, 1 / P, group)
            for part in parts:
                if part.index not in outs:
                    outs[part.index] = place(part.index)
                out = outs[part.index][part.start : part.stop]
                _put(pieces_Pm[:, part.at : part.at + part.width], out, scale, accumulate)
            del send_Pm, pieces_Pm
            # The last gradient of a slice may go on in the next one.
            finished = parts[-1].index + (parts[-1].stop == columns[parts[-1].index])
            for index in range(done, finished):
                yield outs.pop(index) if index in outs else place(index)
            done = finished
        yield from map(place, range(done, len(grads)))

    def to_owners(
        self, bucket_n: torch.Tensor, fragments: Sequence[Fragment], dtype: torch.dtype, group: dist.ProcessGroup
    ) -> None:
        """Average a bucket and give each owner its fragments, as ``dtype``; what else is in the bucket is lost."""
        P, r = dist.get_world_size(group), dist.get_rank(group)
        bounds = [0, *running_sums(fragment.numel for fragment in fragments)]
        owners = [fragment.owner for fragment in fragments]
        wire, sums = self.on_wire(bucket_n.dtype), self.on_wire(dtype)
        # The pieces and this rank's share of the sums; then that share twice, in order of owners, and what it owns.
        share = self._share(max(P * wire.itemsize + sums.itemsize, (2 + P) * sums.itemsize))
        stop = 0
        while stop < bucket_n.numel():
            start, stop = stop, _slice_end(stop, bucket_n.numel(), P * share, P)
            m = math.ceil((stop - start) / P)
            mine_m = bucket_n.new_empty(m, dtype=sums)
            self._sum_share(bucket_n[start:stop], mine_m, 1 / P, group)
            shares = [(start + p * m, min(stop, start + (p + 1) * m)) for p in range(P)]
            owned = [pieces_by_owner(bounds, owners, first, last, P) for first, last in shares]
            received = _hand_over(mine_m, shares[r][0], owned, r, group)
            for piece, sums_of_piece in received:
                fragment = fragments[piece.fragment]
                if fragment.out is None:
                    bucket_n[piece.start : piece.stop].copy_(sums_of_piece)
                else:
                    offset = piece.start - bounds[piece.fragment]
                    fragment.out[offset : offset + piece.numel].add_(sums_of_piece)

    def everywhere(
        self, grads: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], divisor: float, group: dist.ProcessGroup
    ) -> None:
        """Average flat gradients (their sum over ``divisor``) on every rank, into ``outs``, which may be the same."""
        P = dist.get_world_size(group)
        wire, sums = self.on_wire(_widest(grads)), self.on_wire(_widest(outs))
        share = self._share(max(2 * P * wire.itemsize, P * sums.itemsize) + sums.itemsize)
        for parts in segments([grad.numel() for grad in grads], P * share):
            n = parts[-1].at + parts[-1].width
            m = math.ceil(n / P)
            send_n = grads[0].new_zeros(P * m, dtype=wire)
            for part in parts:
                send_n[part.at : part.at + part.width].copy_(grads[part.index][part.start : part.stop])
            mine_m = send_n.new_empty(m, dtype=sums)
            self._sum_share(send_n, mine_m, 1 / divisor, group)
            del send_n
            all_n = mine_m.new_empty(P * m)
            dist.all_gather_into_tensor(all_n, mine_m, group=group)
            for part in parts:
                outs[part.index][part.start : part.stop].copy_(all_n[part.at : part.at + part.width])

    def _share(self, bytes_per_element: int) -> int:
        """A rank's share of a slice, in elements, if each of them needs so many bytes of extra memory on this rank."""
        return max(1, 2 * self.slice_bytes // bytes_per_element)

    def _sum_share(self, slice_n: torch.Tensor, mine_m: torch.Tensor, scale: float, group: dist.ProcessGroup) -> None:
        """Sum this rank's share of a slice: ``[n] -> [m]``, m = ceil(n/P)."""
        P = dist.get_world_size(group)
        if padding := P * mine_m.numel() - slice_n.numel():
            slice_n = F.pad(slice_n, (0, padding))
        pieces_Pm, scale = self._exchange(slice_n.to(self.on_wire(slice_n.dtype)).view(P, -1), scale, group)
        sum_pieces(pieces_Pm, mine_m, scale)

    def _exchange(self, send_Pm: torch.Tensor, scale: float, group: dist.ProcessGroup) -> tuple[torch.Tensor, float]:
        """This rank's pieces and the factor that their sum still needs; one piece where the wire has summed them."""
        if self.dtype == torch.float32:
            received_Pm = torch.empty_like(send_Pm)
            dist.all_to_all_single(received_Pm, send_Pm, group=group)
            return received_Pm, scale
        # Before the sum, as DeepSpeed does it: 16 bits overflow early.
        send_Pm.mul_(scale)
        sum_1m = send_Pm.new_empty(1, send_Pm.shape[1])
        dist.reduce_scatter_tensor(sum_1m, send_Pm, group=group)
        return sum_1m, 1.0


def _slice_end(start: int, end: int, numel: int, num_ranks: int) -> int:
    """Where a slice ends that starts here: what does not split evenly comes last and alone, as padding is a copy."""
    rest = min(end - start, numel)
    return start + (rest - rest % num_ranks if rest > num_ranks else rest)


def _fill(send_Pw: torch.Tensor, grad: torch.Tensor, start: int, num_columns: int) -> None:
    """Columns from ``start`` of a gradient laid out as [P, num_columns], zeros past its end."""
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
    """Sum pieces into a place, or round the sum to its dtype and add it to what is there, as DeepSpeed does."""
    if accumulate and out_w.dtype != torch.float32:
        rounded_w = torch.empty_like(out_w)
        sum_pieces(pieces_Pw, rounded_w, scale)
        out_w.add_(rounded_w)
    else:
        sum_pieces(pieces_Pw, out_w, scale, accumulate)


def _hand_over(
    mine_m: torch.Tensor, first: int, owned: list[list[list[Piece]]], r: int, group: dist.ProcessGroup
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Send each rank what it owns of this rank's share; what this rank owns of all shares, piece by piece.

    Args:
        mine_m: the share, whose first element is element ``first`` of the bucket.
        first: see above.
        owned: ``owned[p][q]`` is what rank q owns of rank p's share.
        r: this rank.
        group: the ranks.
    """
    to_send = [piece for pieces in owned[r] for piece in pieces]
    sent = [mine_m[piece.start - first : piece.stop - first] for piece in to_send]
    in_order = all(a.stop == b.start for a, b in pairwise(to_send))
    numel = sum(piece.numel for piece in to_send)
    send = mine_m[:numel] if in_order else torch.cat(sent)
    to_get = [piece for of_rank in owned for piece in of_rank[r]]
    received = mine_m.new_empty(sum(piece.numel for piece in to_get))
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

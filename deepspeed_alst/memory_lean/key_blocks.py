"""Keys and values of a sequence in blocks of keys, with their rows divided among the ranks that share KV heads.

Of g ranks with the same KV heads each holds 1/g of the rows of every chunk. A block is gathered while attention runs on
the one before, used by all g ranks and dropped; in the backward the gradients of a block are summed over them in fp32,
at the ranks that have its rows. With g = 1 the sequence is one block, which is here.

Legend: B batch, P ranks, s tokens of a rank's shard, S = P*s, c tokens of a chunk, m of its rows here; k KV heads of a
rank, D head dim of q and k, E of v, W = D + E: k and v side by side; R this rank's rows of all chunks, N keys of a
block.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from deepspeed_alst.distributed.collectives import count_sent
from deepspeed_alst.memory_lean.exchange import HeadExchange


class Block(NamedTuple):
    """Adjacent keys of the sequence: those of whole chunks."""

    keys: slice
    own: slice
    """Their rows among the R of each of the g ranks."""
    chunks: list[int]
    """Tokens of each chunk, of which each rank has 1/g, rounded up."""


class KeyBlocks:
    """Keys and values of one call of a layer, or their gradients: tensors ``[R, B, k, W]``.

    Args:
        exchange: how heads are exchanged, and the group of g ranks.
        chunks: chunks of a shard.
        head_dims: D and E.
        key_block: most keys of a block, if no chunk has more.
    """

    def __init__(
        self, exchange: HeadExchange, chunks: Sequence[slice], head_dims: Sequence[int], key_block: int
    ) -> None:
        self._exchange, self._group, self._dims = exchange, exchange.kv_group, list(head_dims)
        P, g, tokens = exchange.plan.sp_size, exchange.plan.kv_parts, [each.stop - each.start for each in chunks]
        self._P, self._g, self.are_gathered, self.length = P, g, self._group is not None, P * sum(tokens)
        rows = itertools.accumulate((-(-c // g) for c in tokens), initial=0)
        self._rows = list(itertools.pairwise(rows))  # of each chunk, among this rank's of a shard
        key, row, self._blocks = 0, 0, list[Block]()
        for c in tokens * P:
            if not self._blocks or key + c - self._blocks[-1].keys.start > key_block:
                self._blocks.append(Block(slice(key, key), slice(row, row), []))
            keys, own, before = self._blocks[-1]
            key, row = key + c, row - -c // g
            self._blocks[-1] = Block(slice(keys.start, key), slice(own.start, row), [*before, c])

    def put(self, x_RBkW: torch.Tensor | None, index: int, *parts_BkPmD: torch.Tensor) -> torch.Tensor:
        """Write a chunk's k and v, ``2 x [B, k, P, m, D]``, into a tensor, which the first call makes; return it."""
        B, k, P, m, _ = parts_BkPmD[0].shape
        if x_RBkW is None:
            x_RBkW = parts_BkPmD[0].new_empty(P * self._rows[-1][1], B, k, sum(self._dims))
        first = self._rows[index][0]
        found = x_RBkW.unflatten(0, (P, -1))[:, first : first + m].split(self._dims, -1)
        for x_PmBkD, part_BkPmD in zip(found, parts_BkPmD, strict=True):
            x_PmBkD.copy_(part_BkPmD.permute(2, 3, 0, 1, 4))
        return x_RBkW

    def of_chunk(self, x_RBkW: torch.Tensor, index: int, num_tokens: int) -> list[torch.Tensor]:
        """Return what ``put`` wrote for a chunk of c ``num_tokens``: ``2 x [B, k, P, m, D]``, views."""
        first = self._rows[index][0]
        own = slice(first, first + self._exchange.num_kv_rows(num_tokens))
        parts = x_RBkW.unflatten(0, (self._P, -1))[:, own].split(self._dims, -1)
        return [x_PmBkD.permute(2, 3, 0, 1, 4) for x_PmBkD in parts]

    def blocks_with(self, intervals: Sequence[tuple[int, int]]) -> list[Block]:
        """Return the blocks that have keys of some intervals."""
        return [
            block
            for block in self._blocks
            if any(first < block.keys.stop and block.keys.start < last for first, last in intervals)
        ]

    def walk(
        self, x_RBkW: torch.Tensor, seen: Sequence[tuple[int, int]], sums_RBkW: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, Sequence[torch.Tensor], Sequence[torch.Tensor]]]:
        """Yield the blocks that rows see: their keys, K and V, ``[B, k, N, D]``, and gradients to add to, with sums.

        Collective over the g ranks, which are to ask for the same intervals of keys, as ``seen``. The gradients of the
        last block are in the sums when the iteration has ended.
        """
        if not self.are_gathered:
            of_sums = () if sums_RBkW is None else self._by_heads(sums_RBkW)
            yield slice(0, self.length), self._by_heads(x_RBkW), of_sums
            return
        blocks, add = self.blocks_with(seen), _nothing
        gathers = (self._gather(x_RBkW, block) for block in blocks)
        ahead = next(gathers)
        for block in blocks:
            x_NBkW, ahead = ahead(), next(gathers, _nothing)
            if sums_RBkW is None:
                yield block.keys, self._by_heads(x_NBkW), ()
                continue
            grads_NBkW = torch.zeros_like(x_NBkW, dtype=sums_RBkW.dtype)
            yield block.keys, self._by_heads(x_NBkW), self._by_heads(grads_NBkW)
            add()
            add = self._reduce(grads_NBkW, block, sums_RBkW)
            del x_NBkW, grads_NBkW
        add()

    def _by_heads(self, x_NBkW: torch.Tensor) -> Sequence[torch.Tensor]:
        return x_NBkW.permute(1, 2, 0, 3).split(self._dims, -1)

    def _gather(self, x_RBkW: torch.Tensor, block: Block) -> Callable[[], torch.Tensor]:
        """Start to gather a block; return a function that waits for it and returns ``[N, B, k, W]``."""
        send = x_RBkW[block.own]
        recv = send.new_empty(self._g * len(send), *send.shape[1:])
        work: Any = dist.all_gather_into_tensor(recv, send, group=self._group, async_op=True)
        count_sent(self._exchange.group, (self._g - 1) * send.nbytes)

        def finish() -> torch.Tensor:
            work.wait()
            of_chunks = recv.unflatten(0, (self._g, -1)).split([-(-c // self._g) for c in block.chunks], 1)
            found = [x.flatten(0, 1)[:c] for x, c in zip(of_chunks, block.chunks, strict=True)]
            return found[0] if len(found) == 1 else torch.cat(found)

        return finish

    def _reduce(self, grads_NBkW: torch.Tensor, block: Block, sums_RBkW: torch.Tensor) -> Callable[[], None]:
        """Start to sum a block's gradients over the ranks; return a function that adds this rank's rows to its sums."""
        padded = [F.pad(x, [0, 0] * 3 + [0, -len(x) % self._g]) for x in grads_NBkW.split(block.chunks)]
        send = torch.cat([x.unflatten(0, (self._g, -1)) for x in padded], 1).flatten(0, 1)
        recv = send.new_empty(len(send) // self._g, *send.shape[1:])
        work: Any = dist.reduce_scatter_tensor(recv, send, group=self._group, async_op=True)
        count_sent(self._exchange.group, send.nbytes - recv.nbytes)

        def finish() -> None:
            work.wait()
            sums_RBkW[block.own] += recv

        return finish


def _nothing() -> Any:
    return None

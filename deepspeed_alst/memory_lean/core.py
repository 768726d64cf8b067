"""Attention of a chunk's queries to the keys of the whole sequence, on this rank's heads.

Legend: B batch, P ranks, s tokens of a rank's shard, c of a chunk that this rank has as rows; h query heads of a rank,
D head dim of q and k, E of v; R, k and W as in key_blocks.py.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.attention.attention_kernels import Kernel, from_sample
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.attention.rectangle_attention import add_attention, add_gradients, without_keys
from deepspeed_alst.attention.rectangles import Rectangle, in_block, rectangles
from deepspeed_alst.memory_lean.exchange import HeadExchange
from deepspeed_alst.memory_lean.key_blocks import KeyBlocks

Where = tuple[slice, slice, int, slice]
"""Samples, heads, shard and rows, in ``[B, h, P, c]``."""


@dataclass(frozen=True)
class Core:
    """Attention of one call of a layer."""

    exchange: HeadExchange
    blocks: KeyBlocks
    num_tokens: int
    """Tokens of a shard, s."""
    mask: MaskSpec | None
    kernel: Kernel
    key_block: int

    def _masks(self) -> list[tuple[slice, MaskSpec | None]]:
        """Return masks, each with its samples."""
        rows = [] if self.mask is None else [(slice(row, row + 1), each) for row, each in enumerate(self.mask.rows)]
        return rows or [(slice(None), self.mask)]

    def _seen(self, chunk: slice) -> list[tuple[int, int]]:
        """Return the intervals of keys that all ranks' rows of a chunk see."""
        s, length, found = self.num_tokens, self.blocks.length, list[tuple[int, int]]()
        for shard, (_, mask) in itertools.product(range(0, length, s), self._masks()):
            first = shard + chunk.start
            of_first = rectangles(first, first + 1, length, mask, length)
            found.append((min(part.first_key for part in of_first), shard + chunk.stop))
        return found

    def pieces(self, chunk: slice) -> Iterator[tuple[Where, list[Rectangle], int, Kernel]]:
        """Yield where adjacent rows are, with their rectangles, their first in the sequence and their kernel."""
        s, length = self.num_tokens, self.blocks.length
        key_block = length if self.blocks.are_gathered else self.key_block  # blocks cut them
        stripes = self.exchange.own_stripes(chunk.stop - chunk.start)
        ends = list(itertools.accumulate(map(len, stripes), initial=0))
        places = list(zip(stripes, itertools.pairwise(ends), strict=True))
        for rank, (stripe, here) in itertools.product(range(self.exchange.plan.sp_size), places):
            first = rank * s + chunk.start + stripe.start
            for samples, mask in self._masks():
                parts = list(rectangles(first, first + len(stripe), length, mask, key_block))
                yield (samples, slice(None), rank, slice(*here)), parts, first, from_sample(self.kernel, samples)

    def _work(
        self, chunk: slice, kv_RBkW: torch.Tensor, sums_RBkW: torch.Tensor | None = None
    ) -> Iterator[tuple[Where, Sequence[torch.Tensor], Sequence[torch.Tensor], tuple[Any, ...]]]:
        """Yield pieces of each block: where their rows are, K and V, gradients to add to, rectangles and kernel."""
        pieces = list(self.pieces(chunk))
        for block, keys_values, sums in self.blocks.walk(kv_RBkW, self._seen(chunk), sums_RBkW):
            for where, parts, first_row, kernel in pieces:
                of_keys, of_sums = ([x[where[0]] for x in each] for each in (keys_values, sums))
                inside = in_block(parts, block.start, block.stop)
                yield where, of_keys, of_sums, (inside, (first_row, block.start), kernel)

    def forward(
        self, chunk: slice, q_BhPcD: torch.Tensor, kv_RBkW: torch.Tensor, value_dim: int, sinks_h: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a chunk's output, ``[B, h, P, c, E]``, and log-sum-exp, ``[B, h, P, c]``."""
        o_BhPcE, lse_BhPc = without_keys(q_BhPcD, value_dim, sinks_h)
        for rows, of_keys, _, how in self._work(chunk, kv_RBkW):
            add_attention(o_BhPcE[rows], lse_BhPc[rows], q_BhPcD[rows], of_keys, *how)
        return o_BhPcE.to(q_BhPcD.dtype), lse_BhPc

    def backward(
        self, chunk: slice, of_queries: Sequence[torch.Tensor], kv_RBkW: torch.Tensor, sums_RBkW: torch.Tensor
    ) -> torch.Tensor:
        """Return the gradient of a chunk's queries; add those of keys and values to sums.

        ``of_queries`` are the output's gradient, q, the output and the log-sum-exp.
        """
        q_BhPcD = of_queries[1]
        dq_BhPcD = torch.zeros(q_BhPcD.shape, dtype=sums_RBkW.dtype, device=q_BhPcD.device)
        for rows, of_keys, of_sums, how in self._work(chunk, kv_RBkW, sums_RBkW):
            add_gradients(dq_BhPcD[rows], *of_sums, [x[rows] for x in of_queries], of_keys, *how)
        return dq_BhPcD.to(q_BhPcD.dtype)

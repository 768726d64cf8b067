"""All-to-alls of a chunk: from its tokens with all heads to this rank's heads of all ranks' chunks, and back.

Legend: B batch, P ranks, c tokens of a rank's chunk, H heads (query or KV), h heads of a rank, D head dim.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeed_alst.kernels.head_layout import by_heads, pack, unpack_
from deepspeed_alst.sequence_parallel.ulysses import HeadPlan, exchange


class HeadExchange(NamedTuple):
    """Exchange of one layer's heads over a sequence-parallel group; without a group all heads are here."""

    plan: HeadPlan
    group: Any

    def own_heads(self) -> slice:
        """Return this rank's query heads."""
        heads = self.plan.heads_of(0 if self.group is None else dist.get_rank(self.group))
        return slice(heads.start, heads.stop)

    def to_heads(self, *tensors_BHcD: torch.Tensor) -> list[torch.Tensor]:
        """Exchange up to three tensors at once: ``[B, H, c, D] -> [B, h, P, c, D]``, views of one buffer."""
        if self.group is None:
            return [x.unsqueeze(2) for x in tensors_BHcD]
        pieces = [by_heads(x, self._pieces(x.shape[1])) for x in tensors_BHcD]
        recv_PcBW = exchange(pack(pieces, self.plan.sp_size), self.group)
        widths = [x.shape[3:] for x in pieces]
        parts = recv_PcBW.split([width.numel() for width in widths], dim=-1)
        return [part.unflatten(-1, width).permute(2, 3, 0, 1, 4) for part, width in zip(parts, widths, strict=True)]

    def to_tokens(self, *tensors_BhPcD: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Exchange up to three tensors of ``heads`` heads in all: ``[B, h, P, c, D] -> [B, H, c, D]``.

        Memory is that of ``[B, c, H, D]``. The gradients of a KV head's copies are summed.
        """
        if self.group is None:
            return [x.squeeze(2) for x in tensors_BhPcD]
        recv_PcBW = exchange(pack([x.permute(2, 3, 0, 1, 4) for x in tensors_BhPcD], self.plan.sp_size), self.group)
        c, B = recv_PcBW.shape[1:3]
        found = [recv_PcBW.new_empty(B, c, heads, x.shape[4]).transpose(1, 2) for x in tensors_BhPcD]
        unpack_(recv_PcBW, [by_heads(x, self._pieces(heads)) for x in found])
        return found

    def _pieces(self, heads: int) -> int:
        return min(self.plan.sp_size, heads)

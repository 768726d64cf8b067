"""All-to-alls of a chunk: from its tokens with all heads to this rank's heads of all ranks' chunks, and back.

Legend: B batch, P ranks, c tokens of a rank's chunk, H heads (query or KV), h heads of a rank, D head dim.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeed_alst.sequence_parallel.head_plan import HeadPlan
from deepspeed_alst.sequence_parallel.ulysses import own_shapes, repeat_heads, sum_copies, to_heads, to_tokens


class HeadExchange(NamedTuple):
    """Exchange of one layer's heads over a sequence-parallel group; without a group all heads are here."""

    plan: HeadPlan
    group: Any

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def own_heads(self) -> slice:
        """Return this rank's query heads."""
        heads = self.plan.heads_of(self.rank)
        return slice(heads.start, heads.stop)

    def to_heads(self, *tensors_BHcD: torch.Tensor) -> list[torch.Tensor]:
        """Exchange up to three tensors at once: ``[B, H, c, D] -> [B, h, P, c, D]``, views of one buffer.

        KV heads are repeated where attention on this rank needs it (``HeadPlan.kv_copies_of``).
        """
        if self.group is None:
            return [x.unsqueeze(2) for x in tensors_BHcD]
        shapes = own_shapes(tensors_BHcD, self.plan, self.group)
        recv_PcBW = to_heads(tensors_BHcD, self.plan, self.group)
        parts = recv_PcBW.split([h * D for h, D in shapes], dim=-1)
        found = [part.unflatten(-1, shape).permute(2, 3, 0, 1, 4) for part, shape in zip(parts, shapes, strict=True)]
        return [repeat_heads(x, self._copies(of.shape[1])) for x, of in zip(found, tensors_BHcD, strict=True)]

    def to_tokens(self, *tensors_BhPcD: torch.Tensor, heads: int) -> list[torch.Tensor]:
        """Exchange up to three tensors of ``heads`` heads in all: ``[B, h, P, c, D] -> [B, H, c, D]``.

        Memory is that of ``[B, c, H, D]``. The gradients of a KV head's copies are summed.
        """
        if self.group is None:
            return [x.squeeze(2) for x in tensors_BhPcD]
        pieces = [sum_copies(x, self._copies(heads)).permute(2, 3, 0, 1, 4) for x in tensors_BhPcD]
        found = to_tokens(pieces, [heads] * len(pieces), self.plan, self.group)
        return [x_BcHD.transpose(1, 2) for x_BcHD in found]

    def _copies(self, heads: int) -> list[int]:
        """Return how often this rank has each of its heads of a tensor of ``heads`` in all: query heads once."""
        return self.plan.kv_copies_of(self.rank) if heads != self.plan.num_heads else [1]

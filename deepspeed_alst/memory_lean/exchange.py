"""All-to-alls of a chunk: from its tokens with all heads to this rank's heads of all ranks' chunks, and back.

Legend: B batch, P ranks, c tokens of a rank's chunk, H heads (query or KV), h heads of a rank, D head dim.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.ulysses import repeat_heads, sum_copies, to_heads, to_tokens


class HeadExchange(NamedTuple):
    """Exchange of one layer's heads over a sequence-parallel group; without a group all heads are here.

    ``kv_group`` are the ranks among which the plan divides rows of K and V, None if it does not.
    """

    plan: HeadPlan
    group: Any
    kv_group: Any = None

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def own_heads(self) -> slice:
        """Return this rank's query heads."""
        heads = self.plan.heads_of(self.rank)
        return slice(heads.start, heads.stop)

    def own_stripes(self, num_tokens: int) -> tuple[range, ...]:
        """Return this rank's query rows of each rank's chunk of ``num_tokens``."""
        return self.plan.stripes(self.rank, num_tokens)

    def num_kv_rows(self, num_tokens: int) -> int:
        """Count this rank's rows of K and V of each rank's chunk of ``num_tokens``."""
        return sum(map(len, self.plan.kv_rows(self.rank, num_tokens)))

    def to_heads(self, kinds: str, *tensors_BHcD: torch.Tensor) -> list[torch.Tensor]:
        """Exchange up to three tensors at once: ``[B, H, c, D] -> [B, h, P, c, D]``, views of one buffer.

        They come with this rank's rows of a chunk (``HeadPlan.shares``). Those of kind "k" or "v" are repeated where
        attention on this rank needs it (``HeadPlan.kv_copies_of``).
        """
        if self.group is None:
            return [x.unsqueeze(2) for x in tensors_BHcD]
        found = [x.permute(2, 3, 0, 1, 4) for x in to_heads(tensors_BHcD, kinds, self.plan, self.group)]
        return [repeat_heads(x, self._copies(kind)) for x, kind in zip(found, kinds, strict=True)]

    def to_tokens(self, kinds: str, num_tokens: int, *tensors_BhPcD: torch.Tensor) -> list[torch.Tensor]:
        """Exchange up to three tensors of chunks of ``num_tokens``: ``[B, h, P, c, D] -> [B, H, c, D]``.

        Memory is that of ``[B, c, H, D]``. The gradients of a KV head's copies are summed.
        """
        if self.group is None:
            return [x.squeeze(2) for x in tensors_BhPcD]
        pieces = [
            sum_copies(x, self._copies(kind)).permute(2, 3, 0, 1, 4)
            for x, kind in zip(tensors_BhPcD, kinds, strict=True)
        ]
        found = to_tokens(pieces, kinds, num_tokens, self.plan, self.group)
        return [x_BcHD.transpose(1, 2) for x_BcHD in found]

    def _copies(self, kind: str) -> list[int]:
        """Return how often this rank has each of its heads of a kind of tensor: query heads once."""
        return [1] if kind == "q" else self.plan.kv_copies_of(self.rank)

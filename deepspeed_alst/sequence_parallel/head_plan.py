"""Split of attention's heads over the ranks of a sequence: plain integers, decided once.

Legend: P ranks, H query heads, K KV heads; query head i attends with KV head ``i // (H/K)``.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.errors import ShapeError


@dataclass(frozen=True)
class HeadPlan:
    """Split of H query heads and K KV heads over P ranks.

    A rank holds adjacent query heads, H/P of them rounded up or down, and the KV heads that they need; a KV head is on
    each rank that needs it. Ranks with a head more are placed so that attention gets the fewest KV heads, copies
    included: of 28 query heads with 4 KV heads, 8 ranks hold 3 or 4 in turn, and one KV head each.
    """

    sp_size: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        P, H, K = self.sp_size, self.num_heads, self.num_kv_heads
        if K < 1 or H % K:
            raise ShapeError(f"{H} query heads are not a multiple of {K} key/value heads")
        if P > H:
            raise ShapeError(
                f"{H} query heads cannot be split over sequence_parallel_size={P} ranks, each of which needs one: use "
                f"at most {H}"
            )

    @property
    def is_even(self) -> bool:
        """True if all ranks hold as many query heads, in groups of one size, and equal parts or copies of KV heads."""
        P, H, K = self.sp_size, self.num_heads, self.num_kv_heads
        return H % P == 0 and (K % P == 0 or P % K == 0)

    @property
    def heads_per_rank(self) -> int:
        """Most query heads of a rank."""
        return -(-self.num_heads // self.sp_size)

    @property
    def imbalance(self) -> float:
        """Largest share of the query heads relative to the mean; 1 if all ranks hold as many."""
        return self.heads_per_rank * self.sp_size / self.num_heads

    @property
    def summary(self) -> str:
        """Unequal shares in words; empty if all ranks hold as many query heads."""
        H, few = self.num_heads, self.num_heads // self.sp_size
        if self.imbalance == 1:
            return ""
        return f"{few} or {few + 1} of {H} query heads per rank, at most {self.imbalance:.2f} of the mean"

    @property
    def largest_rank(self) -> int:
        """First rank with the most heads in attention, of all kinds."""
        return max(range(self.sp_size), key=lambda rank: len(self.heads_of(rank)) + sum(self.kv_copies_of(rank)))

    @property
    def shares_alike(self) -> bool:
        """True if query heads share KV heads in attention on all ranks or on none: both may run different kernels."""
        ranks = range(self.sp_size)
        return len({len(self.heads_of(rank)) == sum(self.kv_copies_of(rank)) for rank in ranks}) == 1

    @property
    def exchanged_heads(self) -> int:
        """Heads of q, k, v and the output that a rank sends or receives per token of its shard, the most of any."""
        P, H, K = self.sp_size, self.num_heads, self.num_kv_heads
        outputs = [len(heads) for heads in self.split(H)]
        inputs = [h + 2 * len(kv_heads) for h, kv_heads in zip(outputs, self.split(K), strict=True)]
        sent = [sum(inputs) - of_q + (P - 1) * h for of_q, h in zip(inputs, outputs, strict=True)]
        received = [(P - 1) * of_q + H - h for of_q, h in zip(inputs, outputs, strict=True)]
        return max(*sent, *received)

    def split(self, num_heads: int) -> tuple[range, ...]:
        """Return each rank's heads of a tensor with all query or all KV heads."""
        P, H, K = self.sp_size, self.num_heads, self.num_kv_heads
        heads = _split(P, H, H // K)
        return heads if num_heads == H else tuple(_groups_of(each, H // K) for each in heads)

    def heads_of(self, rank: int) -> range:
        """Return the query heads of a rank."""
        return self.split(self.num_heads)[rank]

    def kv_heads_of(self, rank: int) -> range:
        """Return the KV heads of a rank."""
        return self.split(self.num_kv_heads)[rank]

    def kv_copies_of(self, rank: int) -> list[int]:
        """Return how many times attention on a rank gets each of its KV heads: as often as makes its groups equal.

        Attention implementations take adjacent query heads as groups of one size. Most ranks have such groups, or one
        KV head; one whose heads straddle KV heads expands these, by the largest group size that divides its own.
        """
        return _copies(self.heads_of(rank), self.num_heads // self.num_kv_heads)


def _groups_of(heads: range, size: int) -> range:
    """Return the groups of ``size`` heads that some adjacent heads are in."""
    return range(heads.start // size, (heads.stop - 1) // size + 1)


def _copies(heads: range, size: int) -> list[int]:
    """Return how many copies of each of their groups make some adjacent heads' groups equal."""
    bounds = ((group * size, (group + 1) * size) for group in _groups_of(heads, size))
    members = [min(heads.stop, end) - max(heads.start, start) for start, end in bounds]
    return [number // math.gcd(*members) for number in members]


@functools.cache
def _split(num_ranks: int, num_heads: int, group_size: int) -> tuple[range, ...]:
    """Return the ranks' heads: of all splits with sizes rounded up or down the one with the fewest KV heads, copied."""
    few, more = num_heads // num_ranks, -(-num_heads // num_ranks)
    # By the end of the heads that are dealt: the copies of KV heads so far, and the bounds between ranks.
    best = {0: (0, (0,))}
    for _ in range(num_ranks):
        before, best = best, {}
        for start, (total, bounds) in before.items():
            for end in {start + few, start + more}:
                found = total + sum(_copies(range(start, end), group_size)), (*bounds, end)
                best[end] = min(found, best.get(end, found))
    bounds = best[num_heads][1]
    return tuple(map(range, bounds, bounds[1:]))


def attention_heads(text_config: Any) -> tuple[int, int] | None:
    """Return the query and KV heads that all layers of a config share; None if it has none, or each layer its own."""
    try:
        heads = [getattr(text_config, f"num_{kind}_heads", None) for kind in ("attention", "key_value")]
    except RuntimeError:  # of transformers, for a value per layer
        return None
    num_heads, num_kv_heads = (value if isinstance(value, int) else 0 for value in heads)
    return (num_heads, num_kv_heads or num_heads) if num_heads else None

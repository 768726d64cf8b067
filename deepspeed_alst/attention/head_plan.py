"""Assign attention heads, and with more ranks than heads query rows, to the ranks of a sequence: integers, once.

Legend: P ranks, H query heads, K KV heads, query head i attends with KV head ``i // (H/K)``; u head groups, r = P/u
row groups.
"""

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels.head_layout import Share

_MAX_LOAD = 8, 7  # largest share of the query heads relative to the mean that fewer KV heads per rank may cost


@dataclass(frozen=True)
class HeadPlan:
    """Split of H query heads and K KV heads over P ranks.

    A rank holds adjacent query heads, H/u of them rounded up or down, and the KV heads that they need; a KV head is on
    each rank that needs it. Ranks with a head more are placed so that attention gets the fewest KV heads, copies
    included: of 28 query heads with 4 KV heads, 8 ranks hold 3 or 4 in turn, and one KV head each.

    Up to H ranks hold heads of their own: u = P. More of them form a grid: r adjacent ranks hold the same heads, each
    with 1/r of the query rows of every shard. Keys and values are those of the whole sequence on every rank, or, with
    ``divides_kv``, 1/g of the rows of every shard on each of the g ranks with the same KV heads. With a ``node_size``,
    the ranks of a node, that divides no sequence among its nodes, those of the g on one node exchange such parts, which
    they then gather.
    """

    sp_size: int
    num_heads: int
    num_kv_heads: int
    divides_kv: bool = False
    node_size: int = 0

    def __post_init__(self) -> None:
        H, K = self.num_heads, self.num_kv_heads
        if K < 1 or H % K:
            raise ShapeError(f"{H} query heads are not a multiple of {K} key/value heads")

    @property
    def head_groups(self) -> int:
        """Groups of ranks with heads of their own, u."""
        return _head_groups(self.sp_size, self.num_heads, self.num_kv_heads)

    @property
    def row_groups(self) -> int:
        """Ranks that share the query rows of the same heads, r."""
        return self.sp_size // self.head_groups

    @functools.cached_property
    def kv_sharers(self) -> int:
        """Adjacent ranks with the same KV heads, g, if these make groups of one size; 1 if not."""
        heads = self.split(self.num_kv_heads)
        groups = [(len(of_rank), sum(1 for _ in ranks)) for of_rank, ranks in itertools.groupby(heads)]
        sizes = {size for _, size in groups}
        return sizes.pop() if len(sizes) == 1 and sum(held for held, _ in groups) == self.num_kv_heads else 1

    @property
    def kv_parts(self) -> int:
        """Ranks among which the rows of a KV head are divided; 1 if each that needs it has all."""
        if self.divides_kv:
            return self.kv_sharers
        return math.gcd(self.kv_sharers, self.node_size) if self.node_size % self.sp_size else 1

    @property
    def is_even(self) -> bool:
        """True if all ranks hold as many query heads, in groups of one size, and equal parts or copies of KV heads."""
        P, H, K = self.sp_size, self.num_heads, self.num_kv_heads
        return H % P == 0 and (K % P == 0 or P % K == 0)

    def is_even_for(self, kinds: str) -> bool:
        """Return True if that holds, and all ranks have all rows of tensors of these kinds."""
        return self.is_even and (self.kv_parts == 1 or set(kinds) == {"q"})

    @property
    def heads_per_rank(self) -> int:
        """Most query heads of a rank."""
        return -(-self.num_heads // self.head_groups)

    @property
    def imbalance(self) -> float:
        """Largest share of attention's work relative to the mean; 1 if all ranks hold as many query heads."""
        return self.heads_per_rank * self.head_groups / self.num_heads

    @property
    def summary(self) -> str:
        """Unequal or shared heads in words; empty if all ranks hold as many query heads, each of all rows."""
        H, r, few = self.num_heads, self.row_groups, self.num_heads // self.head_groups
        if self.imbalance == 1 and r == 1:
            return ""
        heads = f"{few}" if self.imbalance == 1 else f"{few} or {few + 1}"
        most = "" if self.imbalance == 1 else f", at most {self.imbalance:.2f} of the mean"
        rows = "" if r == 1 else f", for 1/{r} of the rows with all keys"
        return f"{heads} of {H} query heads per rank{rows}{most}"

    @property
    def kv_summary(self) -> str:
        """Distribution of KV heads that several ranks need, in words; empty if each is on one rank."""
        P, K = self.sp_size, self.num_kv_heads
        if sum(map(len, self.split(K))) == K:
            return ""
        if self.kv_parts > 1 and not self.divides_kv:
            return f"shared KV heads whole on each rank, gathered from the {self.kv_parts} of its node that share them"
        if self.kv_parts > 1:
            return f"1/{self.kv_parts} of a shared KV head's keys per rank, gathered by block"
        why = f"{P} ranks do not share {K} in groups of one size" if self.kv_sharers == 1 else "not in chunks"
        return f"shared KV heads whole on each rank: {why}"

    @property
    def largest_rank(self) -> int:
        """First rank with the largest total of query heads and KV heads, copies included."""
        return max(range(self.sp_size), key=lambda rank: len(self.heads_of(rank)) + sum(self.kv_copies_of(rank)))

    @property
    def shares_alike(self) -> bool:
        """True if all ranks use grouped-query attention or none does; else they may run different kernels."""
        ranks = range(self.sp_size)
        return len({len(self.heads_of(rank)) == sum(self.kv_copies_of(rank)) for rank in ranks}) == 1

    @property
    def exchanged_heads(self) -> int:
        """Heads of q, k, v and the output that a rank sends or receives per token of its shard, the most of any."""
        P, H, r, g = self.sp_size, self.num_heads, self.row_groups, self.kv_parts
        # All times r * g, for a rank has 1/r of the rows of q and the output, and 1/g of those of k and v.
        outputs = [g * len(heads) for heads in self.split(H)]
        kv_heads = self.split(self.num_kv_heads)
        inputs = [h + 2 * len(of_rank) * r for h, of_rank in zip(outputs, kv_heads, strict=True)]
        sent = [sum(inputs) - of_q + (P - 1) * h for of_q, h in zip(inputs, outputs, strict=True)]
        received = [(P - 1) * of_q + H * r * g - h for of_q, h in zip(inputs, outputs, strict=True)]
        return -(-max(*sent, *received) // (r * g))

    def split(self, num_heads: int) -> tuple[range, ...]:
        """Return each rank's heads of a tensor with all query or all KV heads."""
        H, K = self.num_heads, self.num_kv_heads
        groups = _split(self.head_groups, H, H // K)
        heads = tuple(each for each in groups for _ in range(self.row_groups))
        return heads if num_heads == H else tuple(_groups_of(each, H // K) for each in heads)

    def stripes(self, rank: int, num_tokens: int) -> tuple[range, ...]:
        """Return a rank's query rows of each shard of ``num_tokens``: all, or two of 2r stripes.

        Row group j has stripes j and 2r-1-j, which together see as many keys as any other such pair.
        """
        r, j = self.row_groups, rank % self.row_groups
        bounds = [i * num_tokens // (2 * r) for i in range(2 * r + 1)]
        if r == 1:
            return (range(num_tokens),)
        return tuple(range(bounds[i], bounds[i + 1]) for i in (j, 2 * r - 1 - j))

    def rows(self, rank: int, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield a rank's query rows of the sequence as intervals, adjacent ones as one."""
        first = last = 0
        for shard in range(self.sp_size):
            for stripe in self.stripes(rank, num_tokens):
                start = shard * num_tokens + stripe.start
                if start != last and first != last:
                    yield first, last
                first = first if start == last else start
                last = start + len(stripe)
        if first != last:
            yield first, last

    def shares(self, kind: str, num_tokens: int) -> list[Share]:
        """Return each rank's share of a shard of ``num_tokens``: of kind "q", or of "k" and "v"."""
        heads, rows = (self.num_heads, self.stripes) if kind == "q" else (self.num_kv_heads, self.kv_rows)
        return [Share(of_rank, rows(rank, num_tokens)) for rank, of_rank in enumerate(self.split(heads))]

    def kv_rows(self, rank: int, num_tokens: int) -> tuple[range, ...]:
        """Return a rank's rows of K and V of each shard of ``num_tokens``: all, or one of g parts rounded up."""
        g = self.kv_parts
        rows = -(-num_tokens // g)
        first = min(num_tokens, rank % g * rows)
        return (range(first, min(num_tokens, first + rows)),)

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


@functools.cache
def _head_groups(num_ranks: int, num_heads: int, num_kv_heads: int) -> int:
    """Return u: with more ranks than heads, the divisor of P with the fewest KV heads per rank, then the least work.

    The largest share of the query heads may be 8/7 of the mean, as for 28 heads on 8 ranks: K and V are whole copies.
    """
    if num_ranks <= num_heads:
        return num_ranks

    def cost(groups: int) -> tuple[int, int, int]:
        size = num_heads // num_kv_heads
        kv_heads = max(sum(_copies(heads, size)) for heads in _split(groups, num_heads, size))
        return kv_heads, -(-num_heads // groups) * groups, -groups

    divisors = (u for u in range(1, num_heads + 1) if num_ranks % u == 0)
    return min((u for u in divisors if cost(u)[1] * _MAX_LOAD[1] <= num_heads * _MAX_LOAD[0]), key=cost)


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

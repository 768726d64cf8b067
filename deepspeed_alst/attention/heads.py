"""Which rank holds which heads: integers only, decided once per layer shape. Ulysses, arXiv:2309.14509.

Rank r of P holds query heads ``[r*H/P, (r+1)*H/P)``. Where the K kv heads are at least P, it holds K/P of them; where
they are fewer, P/K neighbouring ranks hold the same one.
"""

from dataclasses import dataclass

from deepspeed_alst.errors import ShapeError


@dataclass(frozen=True)
class HeadPlan:
    """The split of H query heads and K kv heads over P ranks."""

    sp_size: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        P, H, K = self.sp_size, self.num_heads, self.num_kv_heads
        if K < 1 or H % K:
            raise ShapeError(f"{H} query heads are no multiple of {K} key/value heads")
        if H % P:
            raise ShapeError(f"{H} query heads cannot be split over sequence_parallel_size={P} ranks")
        if K % P and P % K:
            raise ShapeError(f"{K} key/value heads and sequence_parallel_size={P} do not divide one another")

    @property
    def heads_per_rank(self) -> int:
        """Query heads that one rank holds."""
        return self.num_heads // self.sp_size

    @property
    def kv_heads_per_rank(self) -> int:
        """Key/value heads that one rank holds, at least one."""
        return max(1, self.num_kv_heads // self.sp_size)

    @property
    def kv_replicas(self) -> int:
        """How many ranks hold the same kv head."""
        return max(1, self.sp_size // self.num_kv_heads)

    def heads_of(self, rank: int) -> range:
        """The query heads of a rank."""
        h = self.heads_per_rank
        return range(rank * h, (rank + 1) * h)

    def kv_heads_of(self, rank: int) -> range:
        """The key/value heads of a rank."""
        first = rank // self.kv_replicas * self.kv_heads_per_rank
        return range(first, first + self.kv_heads_per_rank)

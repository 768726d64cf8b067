"""Split of heads across ranks: integers only, decided once per layer shape. Ulysses, arXiv:2309.14509.

Rank r of P holds query heads ``[r*H/P, (r+1)*H/P)``. With K >= P KV heads it holds K/P of them; with fewer, P/K
neighbouring ranks hold the same one.
"""

from dataclasses import dataclass

from deepspeed_alst.errors import ShapeError


@dataclass(frozen=True)
class HeadPlan:
    """Split of H query heads and K KV heads over P ranks."""

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
        """Number of query heads per rank."""
        return self.num_heads // self.sp_size

    @property
    def kv_heads_per_rank(self) -> int:
        """Number of KV heads per rank, at least one."""
        return max(1, self.num_kv_heads // self.sp_size)

    @property
    def kv_replicas(self) -> int:
        """Number of ranks that hold the same KV head."""
        return max(1, self.sp_size // self.num_kv_heads)

    def heads_of(self, rank: int) -> range:
        """Return the query heads of a rank."""
        h = self.heads_per_rank
        return range(rank * h, (rank + 1) * h)

    def kv_heads_of(self, rank: int) -> range:
        """Return the KV heads of a rank."""
        first = rank // self.kv_replicas * self.kv_heads_per_rank
        return range(first, first + self.kv_heads_per_rank)

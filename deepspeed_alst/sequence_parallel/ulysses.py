"""Ulysses attention (arXiv:2309.14509): all-to-all in, the core on whole sequences, all-to-all out.

q, k and v share one buffer: two collectives in each pass, one in the recomputation if the output is saved.
Legend: B batch, S whole sequence, H query heads, K KV heads, D head dim, P ranks; lower case = local share (s = S/P,
h = H/P, k = KV heads per rank); W = h*D + 2*k*D, the elements of one token for one rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.distributed.collectives import count_sent
from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels.head_layout import by_heads, by_tokens, pack, unpack_

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class HeadPlan:
    """Split of H query heads and K KV heads over P ranks.

    Rank r holds query heads ``[r*H/P, (r+1)*H/P)``, and K/P of the KV heads if K >= P; otherwise P/K neighbouring ranks
    hold the same one.
    """

    sp_size: int
    num_heads: int
    num_kv_heads: int

    def __post_init__(self) -> None:
        P, H, K = self.sp_size, self.num_heads, self.num_kv_heads
        if K < 1 or H % K:
            raise ShapeError(f"{H} query heads are not a multiple of {K} key/value heads")
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


def ulysses_attention(
    q_BHsD: torch.Tensor,
    k_BKsD: torch.Tensor,
    v_BKsD: torch.Tensor,
    group: Any,
    core: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    frame: Any = None,
) -> torch.Tensor:
    """Attend over the whole sequence: ``[B, H, s, D], 2 x [B, K, s, D] -> [B, s, H, D]``.

    ``core`` gets ``[B, h, S, D]`` and twice ``[B, k, S, D]`` and returns ``[B, h, S, D]``. Head size of v may differ.
    With a ``frame`` (offload/attention_cache.py) its output is saved for the recomputation.

    Raises:
        ShapeError: these heads cannot be split over the ranks.
    """
    plan = HeadPlan(dist.get_world_size(group), q_BHsD.shape[1], k_BKsD.shape[1])
    q_BhSD, k_BkSD, v_BkSD = _SeqToHead.apply(q_BHsD, k_BKsD, v_BKsD, plan, group)  # type: ignore[no-untyped-call]
    run = partial(core, q_BhSD, k_BkSD, v_BkSD)
    if frame is None:
        return HeadToSeq.apply(run(), group)  # type: ignore[no-untyped-call]
    from deepspeed_alst.sequence_parallel.cached_ulysses import attend_cached

    return attend_cached(frame, run, group)


class _SeqToHead(torch.autograd.Function):
    """All-to-all from sequence shards of all heads to head shards of the whole sequence."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: HeadPlan, group: Any
    ) -> tuple[torch.Tensor, ...]:
        ctx.plan, ctx.group = plan, group
        recv_PsBW = exchange(pack(_pieces((q, k, v), plan), plan.sp_size), group)
        h, kv = plan.heads_per_rank, plan.kv_heads_per_rank
        return _unpack_heads(recv_PsBW, [(h, q.shape[3]), (kv, k.shape[3]), (kv, v.shape[3])])

    @staticmethod
    def backward(ctx: Any, *grads_BhSD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        plan = ctx.plan
        recv_PsBW = exchange(pack([by_tokens(g, plan.sp_size) for g in grads_BhSD], plan.sp_size), ctx.group)
        s, B = recv_PsBW.shape[1:3]
        # Memory layout of projection outputs: the backward of their transposition copies nothing.
        grads_BHsD = [
            recv_PsBW.new_empty(B, s, heads, g.shape[3]).transpose(1, 2)
            for heads, g in zip((plan.num_heads, plan.num_kv_heads, plan.num_kv_heads), grads_BhSD, strict=True)
        ]
        # unpack_ sums the gradients of a KV head's copies.
        unpack_(recv_PsBW, _pieces(grads_BHsD, plan))
        return (*grads_BHsD, None, None)


class HeadToSeq(torch.autograd.Function):
    """All-to-all from head shards of the whole sequence, ``[B, h, S, D]``, to sequence shards, ``[B, s, H, D]``."""

    @staticmethod
    def forward(ctx: Any, o_BhSD: torch.Tensor, group: Any) -> torch.Tensor:
        """Exchange the output."""
        ctx.group = group
        P = dist.get_world_size(group)
        recv_PsBW = exchange(pack([by_tokens(o_BhSD, P)], P), group)
        B, h, S, D = o_BhSD.shape
        o_BsHD = recv_PsBW.new_empty(B, S // P, P * h, D)
        unpack_(recv_PsBW, [by_heads(o_BsHD.transpose(1, 2), P)])
        return o_BsHD

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Exchange its gradient."""
        P = dist.get_world_size(ctx.group)
        recv_PsBW = exchange(pack([by_heads(do_BsHD.transpose(1, 2), P)], P), ctx.group)
        (do_BhSD,) = _unpack_heads(recv_PsBW, [(do_BsHD.shape[2] // P, do_BsHD.shape[3])])
        return do_BhSD, None


def exchange(send: torch.Tensor, group: Any) -> torch.Tensor:
    """Run an all-to-all: piece p of dim 0 goes to rank p, and piece p of the result comes from rank p."""
    recv = torch.empty_like(send)
    dist.all_to_all_single(recv, send, group=group)
    count_sent(group, send.nbytes - send.nbytes // send.shape[0])
    return recv


def _pieces(qkv_BHsD: Sequence[torch.Tensor], plan: HeadPlan) -> list[torch.Tensor]:
    """Return views of each rank's pieces of q, k and v, or of their gradients."""
    q, k, v = qkv_BHsD
    kv_pieces = plan.sp_size // plan.kv_replicas
    return [by_heads(q, plan.sp_size), by_heads(k, kv_pieces), by_heads(v, kv_pieces)]


def _unpack_heads(recv_PsBW: torch.Tensor, widths: list[tuple[int, int]]) -> Tensors:
    """Return views of the tensors in ``[P, s, B, W]``, which is ``[S, B, W]``: ``[B, h, S, D]`` each, without a copy.

    Attention accepts these strides: sdpa, flash attention and flex only need D to be contiguous.
    """
    recv_SBW = recv_PsBW.flatten(0, 1)
    return tuple(
        part_SBW.unflatten(-1, width).permute(1, 2, 0, 3)  # type: ignore[no-untyped-call]
        for part_SBW, width in zip(torch.split(recv_SBW, [h * D for h, D in widths], dim=-1), widths, strict=True)
    )

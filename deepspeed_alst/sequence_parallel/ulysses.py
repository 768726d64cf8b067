"""Ulysses attention over a sharded sequence: all-to-all in, the core on whole sequences, all-to-all out.

q, k and v share one buffer, so a layer makes two collectives in forward, two in the recomputation and two in backward.
If attention's output is saved, the recomputation makes one: the output is saved as the sequence shard that the layer
continues with, and attention's backward gets it with the gradient. Ulysses, arXiv:2309.14509.

Legend: B batch, S whole sequence, H query heads, K KV heads, D head dim, P ranks; lower case = local share (s = S/P,
h = H/P, k = KV heads per rank); W = h*D + 2*k*D, the elements of one token for one rank.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.distributed.collectives import count_sent
from deepspeed_alst.kernels.head_layout import by_heads, by_tokens, pack, unpack_
from deepspeed_alst.offload.attention_cache import CheckpointFrame, Replaying, record
from deepspeed_alst.sequence_parallel.head_plan import HeadPlan

Tensors = tuple[torch.Tensor, ...]


def ulysses_attention(
    q_BHsD: torch.Tensor,
    k_BKsD: torch.Tensor,
    v_BKsD: torch.Tensor,
    group: Any,
    core: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    frame: CheckpointFrame | None = None,
) -> torch.Tensor:
    """Attend over the whole sequence: ``[B, H, s, D], 2 x [B, K, s, D] -> [B, s, H, D]``.

    ``core`` gets ``[B, h, S, D]`` and twice ``[B, k, S, D]`` and returns ``[B, h, S, D]``. Head size of v may differ.
    With a ``frame`` its output is saved for the recomputation.

    Raises:
        ShapeError: these heads cannot be split over the ranks.
    """
    plan = HeadPlan(dist.get_world_size(group), q_BHsD.shape[1], k_BKsD.shape[1])
    q_BhSD, k_BkSD, v_BkSD = _SeqToHead.apply(q_BHsD, k_BKsD, v_BKsD, plan, group)
    run = partial(core, q_BhSD, k_BkSD, v_BkSD)
    return _HeadToSeq.apply(run(), group) if frame is None else _attend_once(frame, run, group)


def _attend_once(frame: CheckpointFrame, run: Callable[[], torch.Tensor], group: Any) -> torch.Tensor:
    """Run the core and return its output as ``[B, s, H, D]``, saved for or reused in the recomputation."""
    if frame.recomputing:
        return _attend_again(frame, run, group)
    o_BhSD, ran = record(frame, run)
    as_shard = len(ran) == 1 and _is_all_of(o_BhSD, ran[0].outputs[0])
    flat = [x for each in ran for x in each.lay_flat()]
    if not as_shard:
        frame.keep(*flat, note=(ran, as_shard))
        return _HeadToSeq.apply(o_BhSD, group)
    o_BsHD = _HeadToSeqKept.apply(o_BhSD, None, group)
    frame.keep(o_BsHD, flat[1], note=(ran, as_shard))
    return o_BsHD


def _attend_again(frame: CheckpointFrame, run: Callable[[], torch.Tensor], group: Any) -> torch.Tensor:
    (ran, as_shard), kept = frame.take()
    if not as_shard:
        with Replaying(ran, kept):
            o_BhSD = run()
        return _HeadToSeq.apply(o_BhSD, group)
    o_BsHD, log_sum_exp = kept
    empty = torch.empty_strided(*ran[0].layouts[0], dtype=o_BsHD.dtype, device=o_BsHD.device)
    with Replaying(ran, [empty, log_sum_exp]):
        o_BhSD = run()
    # Autograd holds the storage, which stays empty until the backward fills it.
    empty.untyped_storage().resize_(0)
    return _HeadToSeqKept.apply(o_BhSD, o_BsHD, group)


def _is_all_of(x: torch.Tensor, of: torch.Tensor) -> bool:
    """Return True if x is a view of all elements of a tensor that has its storage for itself."""
    memory = of.untyped_storage()
    is_alone = memory.nbytes() == of.numel() * of.element_size()
    return is_alone and x.untyped_storage()._cdata == memory._cdata and x.numel() == of.numel() and x.dtype == of.dtype


def head_to_seq(x_BShD: torch.Tensor, group: Any) -> torch.Tensor:
    """Exchange a head shard for a sequence shard: ``[B, S, h, D] -> [B, s, H, D]``. One all-to-all, one in backward."""
    return _HeadToSeq.apply(x_BShD.transpose(1, 2), group)


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


class _HeadToSeq(torch.autograd.Function):
    """All-to-all from head shards of the whole sequence, ``[B, h, S, D]``, to sequence shards, ``[B, s, H, D]``."""

    @staticmethod
    def forward(ctx: Any, o_BhSD: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        P = dist.get_world_size(group)
        recv_PsBW = exchange(pack([by_tokens(o_BhSD, P)], P), group)
        B, h, S, D = o_BhSD.shape
        o_BsHD = recv_PsBW.new_empty(B, S // P, P * h, D)
        unpack_(recv_PsBW, [by_heads(o_BsHD.transpose(1, 2), P)])
        return o_BsHD

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor, None]:
        P = dist.get_world_size(ctx.group)
        recv_PsBW = exchange(pack([by_heads(do_BsHD.transpose(1, 2), P)], P), ctx.group)
        (do_BhSD,) = _unpack_heads(recv_PsBW, [(do_BsHD.shape[2] // P, do_BsHD.shape[3])])
        return do_BhSD, None


class _HeadToSeqKept(torch.autograd.Function):
    """``_HeadToSeq`` whose output, ``[B, s, H, D]``, is already available in the recomputation.

    Its input, ``[B, h, S, D]``, then has no memory. The backward exchanges the input's values together with the
    gradient, before attention's backward, which holds the same storage, reads them.
    """

    @staticmethod
    def forward(ctx: Any, o_BhSD: torch.Tensor, o_BsHD: torch.Tensor | None, group: Any) -> torch.Tensor:
        ctx.group = group
        # Also saved in the recomputation, which sends nothing: a checkpoint counts saved tensors.
        o_BsHD = _HeadToSeq.forward(ctx, o_BhSD, group) if o_BsHD is None else o_BsHD.detach()
        ctx.save_for_backward(o_BhSD, o_BsHD)
        return o_BsHD

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Under a non-reentrant checkpoint, reading these triggers the recomputation.
        o_BhSD, o_BsHD = ctx.saved_tensors
        storage = o_BhSD.untyped_storage()
        if storage.nbytes():
            return *_HeadToSeq.backward(ctx, do_BsHD), None
        B, h, S, D = o_BhSD.shape
        P = dist.get_world_size(ctx.group)
        send_PsBW = pack([by_heads(x_BsHD.transpose(1, 2), P) for x_BsHD in (do_BsHD, o_BsHD)], P)
        recv_PsBW = exchange(send_PsBW, ctx.group)
        storage.resize_(o_BhSD.numel() * o_BhSD.element_size())
        # A view would keep the buffer's other half in memory until attention's backward ends.
        do_BhSD = recv_PsBW.new_empty(B, S, h, D).transpose(1, 2)
        # Filling the output, which was saved empty, must not count as a modification.
        with torch.autograd._unsafe_preserve_version_counter(o_BhSD):
            unpack_(recv_PsBW, [by_tokens(do_BhSD, P), by_tokens(o_BhSD.detach(), P)])
        return do_BhSD, None, None


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
        part_SBW.unflatten(-1, width).permute(1, 2, 0, 3)
        for part_SBW, width in zip(recv_SBW.split([h * D for h, D in widths], dim=-1), widths, strict=True)
    )

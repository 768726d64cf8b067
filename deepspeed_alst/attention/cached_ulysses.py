"""Ulysses attention with its output saved for the recomputation of its layer, which then makes one collective.

The output is saved as a sequence shard; attention's backward gets it as a head shard, in one collective with its
gradient. Legend as in ulysses.py.
"""

from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.attention.attention_cache import CheckpointFrame, ReplayMode, record_attention
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.ulysses import HeadToSeq, to_blocks
from deepspeed_alst.kernels.head_layout import by_tokens, unpack_


def attend_cached(
    frame: CheckpointFrame, run: Callable[[], torch.Tensor], num_tokens: int, plan: HeadPlan, group: Any
) -> torch.Tensor:
    """Run the core and return its output as ``[B, s, H, D]``, saved for or reused in the recomputation."""
    if frame.recomputing:
        return _replay(frame, run, num_tokens, plan, group)
    o_BhSD, ops = record_attention(frame, run)
    # Decided alike on all ranks, as only a saved shard spares the recomputation its collective.
    as_shard = plan.shares_alike and len(ops) == 1 and _is_all_of(o_BhSD, ops[0].outputs[0])
    flat = [x for op in ops for x in op.pop_outputs()]
    if not as_shard:
        frame.save(*flat, note=(ops, as_shard))
        return HeadToSeq.apply(o_BhSD, num_tokens, plan, group)
    o_BsHD = _HeadToSeqSaved.apply(o_BhSD, None, num_tokens, plan, group)
    frame.save(o_BsHD, flat[1], note=(ops, as_shard))
    return o_BsHD


def _replay(
    frame: CheckpointFrame, run: Callable[[], torch.Tensor], num_tokens: int, plan: HeadPlan, group: Any
) -> torch.Tensor:
    (ops, as_shard), saved = frame.load()
    if not as_shard:
        with ReplayMode(ops, saved):
            o_BhSD = run()
        return HeadToSeq.apply(o_BhSD, num_tokens, plan, group)
    o_BsHD, log_sum_exp = saved
    empty = torch.empty_strided(*ops[0].layouts[0], dtype=o_BsHD.dtype, device=o_BsHD.device)
    with ReplayMode(ops, [empty, log_sum_exp]):
        o_BhSD = run()
    # Autograd holds the storage, which stays empty until the backward fills it.
    empty.untyped_storage().resize_(0)
    return _HeadToSeqSaved.apply(o_BhSD, o_BsHD, num_tokens, plan, group)


def _is_all_of(x: torch.Tensor, of: torch.Tensor) -> bool:
    """Return True if x is a view of all elements of a tensor that has its storage for itself."""
    memory = of.untyped_storage()
    is_alone = memory.nbytes() == of.numel() * of.element_size()
    return is_alone and x.untyped_storage()._cdata == memory._cdata and x.numel() == of.numel() and x.dtype == of.dtype


class _HeadToSeqSaved(torch.autograd.Function):
    """``HeadToSeq`` whose output, ``[B, s, H, D]``, is already available in the recomputation.

    Its input, ``[B, h, S, D]``, then has no memory. The backward exchanges the input's values together with the
    gradient, before attention's backward, which holds the same storage, reads them.
    """

    @staticmethod
    def forward(
        ctx: Any, o_BhSD: torch.Tensor, o_BsHD: torch.Tensor | None, num_tokens: int, plan: HeadPlan, group: Any
    ) -> torch.Tensor:
        ctx.plan, ctx.group = plan, group
        # Also saved in the recomputation, which sends nothing: a checkpoint counts saved tensors.
        o_BsHD = HeadToSeq.forward(ctx, o_BhSD, num_tokens, plan, group) if o_BsHD is None else o_BsHD.detach()
        ctx.save_for_backward(o_BhSD, o_BsHD)
        return o_BsHD

    @staticmethod
    def backward(ctx: Any, do_BsHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # Under a non-reentrant checkpoint, reading these triggers the recomputation.
        o_BhSD, o_BsHD = ctx.saved_tensors
        storage = o_BhSD.untyped_storage()
        if storage.nbytes():
            return *HeadToSeq.backward(ctx, do_BsHD), None
        (B, h, S, D), P = o_BhSD.shape, ctx.plan.sp_size
        (recv_PsBW,) = to_blocks([x.transpose(1, 2) for x in (do_BsHD, o_BsHD)], "qq", ctx.plan, ctx.group)
        storage.resize_(o_BhSD.numel() * o_BhSD.element_size())
        # A view would keep the buffer's other half in memory until attention's backward ends.
        do_BhSD = recv_PsBW.new_empty(B, S, h, D).transpose(1, 2)
        # Filling the output, which was saved empty, must not count as a modification.
        with torch.autograd._unsafe_preserve_version_counter(o_BhSD):
            unpack_(recv_PsBW, [by_tokens(do_BhSD, P), by_tokens(o_BhSD.detach(), P)])
        return do_BhSD, None, None, None, None

"""Gradient reduction of this package in place of DeepSpeed's: instance methods of one engine, undone by ``patches``.

DeepSpeed keeps the filling of buckets, streams, accumulation, offload, norms, clipping and overflow checks.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.grad_reduction.reduce import Fragment, Reduction

_STAGE3 = "_DeepSpeedZeroOptimizer_Stage3__"


@dataclass(frozen=True)
class ReductionPath:
    """Path of an engine's gradients, for the report."""

    hops: tuple[torch.dtype, ...]  # dtype on the wire of each exchange
    reductions: int = 1  # of each gradient per step
    bucket_size: int | None = None  # elements; None without buckets
    besides: str = ""  # further memory use, as text

    def bytes_sent(self, engine: Any) -> float:
        """Return the bytes sent by one rank per step."""
        ranks = dist.get_world_size()
        params = [param for param in engine.module.parameters() if param.requires_grad]
        numel = sum(getattr(param, "ds_numel", param.numel()) for param in params)
        return numel * sum(dtype.itemsize for dtype in self.hops) * (ranks - 1) / ranks * self.reductions


def install_reduction(engine: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Average an engine's gradients by ``reduction``, on the path of its ZeRO stage and options."""
    if any(is_moe_param(param) for param in engine.module.parameters()):
        raise UnsupportedModelError(
            "the model has deepspeed.moe layers, whose process groups do not support sequence parallelism; use a "
            "transformers mixture of experts"
        )
    optimizer = engine.optimizer
    # By the optimizer's methods, not by stage: with bf16 and fp32 accumulation stage 1 has its own optimizer.
    if hasattr(optimizer, _STAGE3 + "avg_scatter_grads"):
        return _install_stage3(engine, reduction, patches)
    if hasattr(optimizer, "gradient_reduction_w_predivide"):
        return _install_stage12(engine, reduction, patches)
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        return _install_bf16_optimizer(engine, reduction, patches)
    return _install_stage0(engine, reduction, patches)


def _install_stage3(engine: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Write sums to the optimizer's gradient partitions, through the device if they are on the host."""
    optimizer = engine.optimizer

    def kept(param: Any) -> torch.Tensor:
        return getattr(optimizer, _STAGE3 + "param_id_to_grad_partition")[param.ds_id]

    def is_in_place(params: list[Any]) -> bool:
        return get_accelerator().on_accelerator(kept(params[0]))

    def avg_scatter_grads(params: list[Any], communication_data_type: torch.dtype) -> Iterator[torch.Tensor]:
        in_place = is_in_place(params)
        group = optimizer._get_param_partition_group(params[0])
        P, r = dist.get_world_size(group), dist.get_rank(group)
        columns = [math.ceil(param.ds_numel / P) for param in params]

        def place(index: int) -> torch.Tensor:
            if in_place:
                return kept(params[index])
            return params[index].grad.new_empty(columns[index], dtype=optimizer.gradient_accumulation_dtype)

        accumulate = in_place and optimizer.micro_step_id > 0
        shares = reduction.reduce_scatter([param.grad for param in params], place, accumulate, group)
        # Beyond a gradient's end a shard is only padding.
        return (share[: max(0, p.ds_numel - r * c)] for share, p, c in zip(shares, params, columns, strict=True))

    def partition_grads(original: Callable[..., Any], params: list[Any], shares: Iterator[torch.Tensor]) -> Any:
        # An in-place shard would be added to itself in a later micro-step, but is copied in the first.
        step = optimizer.micro_step_id
        optimizer.micro_step_id = 0 if is_in_place(params) else step
        try:
            return original(params, shares)
        finally:
            optimizer.micro_step_id = step

    # With reduce_scatter false DeepSpeed would all-reduce whole buckets.
    patches.set(optimizer, "reduce_scatter", True)
    patches.set(optimizer, _STAGE3 + "avg_scatter_grads", avg_scatter_grads)
    patches.wrap(optimizer, "partition_grads", lambda original: functools.partial(partition_grads, original))
    wire = reduction.on_wire(optimizer.communication_data_type)
    return ReductionPath((wire,), engine.gradient_accumulation_steps(), optimizer.reduce_bucket_size)


def _install_stage12(engine: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Send sums to the ranks that own them: into the bucket, or added to the fp32 partition.

    Muon steps with whole matrices, so each rank that owns part of one needs its whole gradient: sums go to all ranks.
    """
    optimizer = engine.optimizer
    has_muon = any(optimizer._is_muon_group(group) for group in optimizer.bit16_groups)

    def reduce_bucket(bucket_n: torch.Tensor, communication_data_type: torch.dtype) -> torch.Tensor:
        group = optimizer.dp_process_group
        if has_muon:
            reduction.all_reduce([bucket_n], [bucket_n], dist.get_world_size(group), group)
        elif bucket_n.numel():
            params = optimizer.ipg_buckets[communication_data_type].params
            fragments = [each for param in params for each in _fragments(optimizer, *param)]
            compact = any(optimizer._use_compact_grad_partition_buffer(group) for group, _, _ in params)
            dtype = torch.float32 if compact else bucket_n.dtype
            reduction.reduce_to_owners(bucket_n, fragments, dtype, group)
        return bucket_n

    def allreduce_bucket(
        bucket: list[torch.Tensor], communication_data_type: torch.dtype, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the bucket's average: with contiguous_gradients false DeepSpeed flattens, and keeps its part."""
        flat_n = optimizer.flatten(bucket)
        group = optimizer.dp_process_group
        average_n = flat_n.to(torch.promote_types(flat_n.dtype, optimizer.gradient_accumulation_dtype))
        reduction.all_reduce([flat_n], [average_n], dist.get_world_size(group), group)
        return average_n

    # The whole-bucket path: it keeps DeepSpeed's waits and streams, and does not split the bucket.
    patches.set(optimizer, "reduce_scatter", False)
    patches.set(optimizer, "gradient_reduction_w_predivide", reduce_bucket)
    if not has_muon:
        patches.set(optimizer, "_add_full_reduction_to_compact_grad_partition", lambda *_: None)
    patches.set(optimizer, "allreduce_bucket", allreduce_bucket)
    dtype = optimizer._gradient_reduction_buffer_dtype()
    sums = torch.float32 if optimizer._use_compact_grad_partition_buffer(0) else dtype
    return ReductionPath(
        (reduction.on_wire(dtype), reduction.on_wire(sums)),
        reductions=engine.gradient_accumulation_steps() if optimizer.partition_gradients else 1,
        bucket_size=optimizer.reduce_bucket_size,
        besides="" if optimizer.contiguous_gradients else ", and a copy of the bucket: contiguous_gradients is false",
    )


def _fragments(optimizer: Any, group: int, index_in_group: int, param_id: int) -> Iterator[Fragment]:
    """Yield the fragments of one gradient with their owner ranks, in the gradient's order."""
    numel = optimizer.bit16_groups[group][index_in_group].numel()
    starts = sorted(
        (optimizer.grad_start_offset[group][owner][param_id], owner)
        for owner in optimizer.param_to_partition_ids[group][param_id]
    )
    for (start, owner), (stop, _) in zip(starts, [*starts[1:], (numel, None)], strict=True):
        # None unless this rank owns it and keeps a separate fp32 partition.
        out = optimizer._get_compact_grad_partition_slice(group, owner, param_id, stop - start)
        yield Fragment(stop - start, owner, out)


def _install_bf16_optimizer(engine: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Send sums only to the rank that steps with them: ZeRO 1 of a bf16 model with fp32 gradient accumulation.

    The optimizer adds micro-steps in flat buffers of the whole gradient, in equal partitions. It has the engine
    all-reduce them, but reads only its own partition and the norm.
    """
    optimizer, has_averages = engine.optimizer, False
    group, own = optimizer.dp_process_group, optimizer.fp32_groups_gradient_flat_partition

    def reopen() -> None:
        """Scale averages by P before another backward: in DeepSpeed every rank contributes them."""
        nonlocal has_averages
        if has_averages:
            torch._foreach_mul_(own, dist.get_world_size(group))
        has_averages = False

    def add(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        reopen()
        original(*args, **kwargs)

    def reduce(grads: Any = None, elements_per_buffer: int | None = None) -> None:
        nonlocal has_averages
        reopen()
        r = dist.get_rank(group)
        for whole_n, own_n in zip(optimizer.fp32_groups_gradients_flat, own, strict=True):
            for _ in reduction.reduce_scatter([whole_n], lambda _, own_n=own_n: own_n, False, group):
                pass  # written in place
            whole_n[: r * own_n.numel()].zero_()
            whole_n[(r + 1) * own_n.numel() :].zero_()
        has_averages = True

    def grads_for_norm(for_clipping: bool = False) -> Any:
        """Return whole partitions, as they also hold gradients that only other ranks have, or the norm of all."""
        if for_clipping:
            return own
        squares = torch.stack([own_n.norm() for own_n in own]).square().sum()
        dist.all_reduce(squares, group=group)
        return [squares.sqrt()], {}

    patches.set(engine, "buffered_allreduce_fallback", reduce)
    patches.set(optimizer, "get_grads_for_norm", grads_for_norm)
    patches.wrap(optimizer, "_update_hp_grad", lambda original: functools.partial(add, original))
    return ReductionPath((reduction.on_wire(optimizer.grad_acc_dtype),))


def _install_stage0(engine: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Send sums to all ranks, in place."""

    def allreduce_and_copy(
        bucket: list[torch.Tensor], dp_group: dist.ProcessGroup, dp_world_size: float | None = None
    ) -> None:
        flat = [grad.contiguous().view(-1) for grad in bucket]
        reduction.all_reduce(flat, flat, dp_world_size or dist.get_world_size(dp_group), dp_group)
        for grad, flat_n in zip(bucket, flat, strict=True):
            if not grad.is_contiguous():
                grad.copy_(flat_n.view_as(grad))

    patches.set(engine, "allreduce_and_copy", allreduce_and_copy)
    own = next((param.dtype for param in engine.module.parameters() if param.requires_grad), torch.float32)
    return ReductionPath((reduction.on_wire(own),) * 2)

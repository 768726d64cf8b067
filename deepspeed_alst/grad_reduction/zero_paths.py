"""Gradient reduction of this package in place of DeepSpeed's: instance methods of one engine, undone by ``patches``.

DeepSpeed keeps the bucket filling, the streams and events around the reduction, accumulation over micro-steps, offload,
norms, clipping and overflow checks. It passes the gradients of one bucket, to be averaged.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.grad_reduction.partitions import Partitions
from deepspeed_alst.grad_reduction.reduce import Fragment, Reduction

_STAGE3 = "_DeepSpeedZeroOptimizer_Stage3__"


@dataclass(frozen=True)
class ReductionPath:
    """Path of an engine's gradients, for the report."""

    hops: tuple[torch.dtype, ...]
    """Dtype on the wire of each exchange."""
    each_micro_step: bool
    bucket_size: int | None
    """Elements per bucket; None without buckets."""
    besides: str = ""
    """Further memory use, as text."""

    def reductions(self, engine: Any) -> int:
        """Return the number of reductions of each gradient per step."""
        return engine.gradient_accumulation_steps() if self.each_micro_step else 1

    def bytes_sent(self, engine: Any) -> float:
        """Return the bytes sent by one rank per step."""
        ranks = dist.get_world_size()
        params = [param for param in engine.module.parameters() if param.requires_grad]
        numel = sum(getattr(param, "ds_numel", param.numel()) for param in params)
        return numel * sum(dtype.itemsize for dtype in self.hops) * (ranks - 1) / ranks * self.reductions(engine)


def reduction_of(config: AlstConfig) -> Reduction:
    """Build the Reduction that the config asks for."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return Reduction(dtype[config.seq_parallel_communication_data_type], config.alst.reduction.slice_bytes)


def install_reduction(engine: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Average an engine's gradients by ``reduction``, on the path of its ZeRO stage and options.

    Raises:
        UnsupportedModelError: the model has experts of DeepSpeed's own MoE layer, which are reduced over other ranks.
    """
    if any(is_moe_param(param) for param in engine.module.parameters()):
        raise UnsupportedModelError(
            "the model has experts of deepspeed.moe, whose groups of ranks know nothing of sequence parallelism; "
            "use a transformers mixture of experts"
        )
    optimizer = engine.optimizer
    # By the optimizer's methods, not by stage: with bf16 and fp32 accumulation stage 1 has its own optimizer.
    if hasattr(optimizer, _STAGE3 + "avg_scatter_grads"):
        return _install_stage3(optimizer, reduction, patches)
    if hasattr(optimizer, "gradient_reduction_w_predivide"):
        return _install_stage12(optimizer, reduction, patches)
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):
        return _install_bf16_optimizer(engine, reduction, patches)
    return _install_stage0(engine, reduction, patches)


def _install_stage3(optimizer: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Write sums to the optimizer's gradient partitions, through the device if they are on the host."""
    # With reduce_scatter false DeepSpeed would all-reduce whole buckets.
    patches.set(optimizer, "reduce_scatter", True)

    def avg_scatter_grads(params: list[Any], communication_data_type: torch.dtype) -> _Shares:
        kept = getattr(optimizer, _STAGE3 + "param_id_to_grad_partition")
        in_place = get_accelerator().on_accelerator(kept[params[0].ds_id])
        group = optimizer._get_param_partition_group(params[0])
        P, r = dist.get_world_size(group), dist.get_rank(group)

        def place(index: int) -> torch.Tensor:
            if in_place:
                return kept[params[index].ds_id]
            grad, c = params[index].grad, math.ceil(params[index].ds_numel / P)
            return grad.new_empty(c, dtype=optimizer.gradient_accumulation_dtype)

        accumulate = in_place and optimizer.micro_step_id > 0
        shares = reduction.shard([param.grad for param in params], place, accumulate, group)
        # Beyond a gradient's end a shard is only padding.
        ends = [param.ds_numel - r * math.ceil(param.ds_numel / P) for param in params]
        return _Shares((share[: max(0, end)] for share, end in zip(shares, ends, strict=True)), in_place)

    def partition_grads(original: Callable[..., Any]) -> Callable[..., Any]:
        def keep(params: list[Any], shares: _Shares) -> Any:
            # An in-place shard would be added to itself in a later micro-step, but is copied in the first.
            step = optimizer.micro_step_id
            optimizer.micro_step_id = 0 if shares.in_place else step
            try:
                return original(params, shares.shares)
            finally:
                optimizer.micro_step_id = step

        return keep

    patches.set(optimizer, _STAGE3 + "avg_scatter_grads", avg_scatter_grads)
    patches.wrap(optimizer, "partition_grads", partition_grads)
    wire = reduction.on_wire(optimizer.communication_data_type)
    return ReductionPath((wire,), each_micro_step=True, bucket_size=optimizer.reduce_bucket_size)


@dataclass
class _Shares:
    """This rank's shards of a bucket's gradients, computed lazily."""

    shares: Iterator[torch.Tensor]
    in_place: bool


def _install_stage12(optimizer: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Send sums to the ranks that own them: into the bucket, or added to the fp32 partition.

    Muon steps with whole matrices, so each rank that owns part of one needs its whole gradient: sums go to all ranks.
    """
    has_muon = any(optimizer._is_muon_group(group) for group in optimizer.bit16_groups)

    def reduce_bucket(bucket_n: torch.Tensor, communication_data_type: torch.dtype) -> torch.Tensor:
        group = optimizer.dp_process_group
        if has_muon:
            reduction.everywhere([bucket_n], [bucket_n], dist.get_world_size(group), group)
        elif bucket_n.numel():
            params = optimizer.ipg_buckets[communication_data_type].params
            fragments = [each for param in params for each in _fragments(optimizer, *param)]
            compact = any(optimizer._use_compact_grad_partition_buffer(group) for group, _, _ in params)
            dtype = torch.float32 if compact else bucket_n.dtype
            reduction.to_owners(bucket_n, fragments, dtype, group)
        return bucket_n

    def allreduce_bucket(
        bucket: list[torch.Tensor], communication_data_type: torch.dtype, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the bucket's average: with contiguous_gradients false DeepSpeed flattens, and keeps its part."""
        flat_n = optimizer.flatten(bucket)
        group = optimizer.dp_process_group
        average_n = flat_n.to(torch.promote_types(flat_n.dtype, optimizer.gradient_accumulation_dtype))
        reduction.everywhere([flat_n], [average_n], dist.get_world_size(group), group)
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
        each_micro_step=optimizer.partition_gradients,
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
    """Send sums only to the rank that steps with them (grad_reduction/partitions.py)."""
    optimizer = engine.optimizer
    partitions = Partitions(optimizer, reduction)
    patches.set(engine, "buffered_allreduce_fallback", partitions.reduce)
    patches.set(optimizer, "get_grads_for_norm", partitions.grads_for_norm)
    patches.wrap(optimizer, "_update_hp_grad", partitions.adding_first)
    patches.wrap(optimizer, "clear_hp_grads", partitions.forgetting_after)
    wire = reduction.on_wire(optimizer.grad_acc_dtype)
    return ReductionPath((wire,), each_micro_step=False, bucket_size=None)


def _install_stage0(engine: Any, reduction: Reduction, patches: PatchSet) -> ReductionPath:
    """Send sums to all ranks, in place."""

    def allreduce_and_copy(
        bucket: list[torch.Tensor], dp_group: dist.ProcessGroup, dp_world_size: float | None = None
    ) -> None:
        flat = [grad.contiguous().view(-1) for grad in bucket]
        reduction.everywhere(flat, flat, dp_world_size or dist.get_world_size(dp_group), dp_group)
        for grad, flat_n in zip(bucket, flat, strict=True):
            if not grad.is_contiguous():
                grad.copy_(flat_n.view_as(grad))

    patches.set(engine, "allreduce_and_copy", allreduce_and_copy)
    own = next((param.dtype for param in engine.module.parameters() if param.requires_grad), torch.float32)
    wire = reduction.on_wire(own)
    return ReductionPath((wire, wire), each_micro_step=False, bucket_size=None)

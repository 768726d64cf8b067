"""``alst.reduction.bucket_size``: how many elements DeepSpeed's gradient buckets hold."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from deepspeed_alst.config import AlstConfig
from deepspeed_alst.deepspeed_values import zero_stage
from deepspeed_alst.offload.memory import ranks_on_host

# DeepSpeed's own default: beyond it a bucket gains nothing.
_MOST = 500_000_000
# Below it the collectives' latency shows.
_LEAST = 1 << 20
# Activations need the rest.
_SHARE = 32


def bucket_numel(model: Any, ds_config: dict[str, Any], group: dist.ProcessGroup) -> tuple[int, str]:
    """The bucket size that ``"auto"`` stands for, the same on all ranks, and what it was made of, in words.

    A thirty-second of the device memory that the rank with the least has left when weights, gradients and optimizer
    states are in their places, at most 5e8 elements and no more than there are gradients. An estimate: it is made
    before the engine is.
    """
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters() if param.requires_grad)
    spare = torch.tensor([_available() - _needed(numel, model, ds_config)], dtype=torch.int64)
    spare = spare.to(get_accelerator().current_device_name()) if dist.get_backend(group) == "nccl" else spare
    dist.all_reduce(spare, op=dist.ReduceOp.MIN, group=group)
    return (
        fitting_numel(ds_config, int(spare.item()), numel),
        f"auto: 1/{_SHARE} of {max(0, int(spare.item())) / 2**30:.1f} GiB to spare, {numel:,} gradient elements",
    )


def fitting_numel(ds_config: Mapping[str, Any], spare_bytes: int, numel: int) -> int:
    """Elements of each bucket for so many bytes to spare, and so many gradients."""
    fitting = spare_bytes // _SHARE // (num_buckets(ds_config) * _gradient_bytes(ds_config))
    return max(_LEAST, min(fitting, _MOST, numel))


def num_buckets(ds_config: Mapping[str, Any]) -> int:
    """How many DeepSpeed fills by turns: two where ZeRO 1 or 2 overlaps the reduction with the backward."""
    zero = ds_config.get("zero_optimization") or {}
    return 2 if zero.get("overlap_comm") and zero_stage(dict(ds_config)) < 3 else 1


def _available() -> int:
    """Bytes free for this rank."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return accelerator.available_memory()
    return accelerator.available_memory() // ranks_on_host()


def _needed(numel: int, model: Any, ds_config: dict[str, Any]) -> int:
    """Bytes that weights, gradients and Adam's states still take of the device, by the arithmetic of ZeRO's paper.

    Source: arXiv:1910.02054, section 3.1: 12 bytes a parameter of fp32 weights, momentum and variance.
    """
    zero = ds_config.get("zero_optimization") or {}
    stage, ranks = zero_stage(ds_config), dist.get_world_size()
    weight_bytes = sum(
        param.numel() * param.element_size()
        for param in model.parameters()
        if param.device.type != get_accelerator().device_name()
    ) // (ranks if stage == 3 else 1)
    gradient_bytes = numel * _gradient_bytes(ds_config) // (ranks if stage >= 2 else 1)
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") not in ("none", None)
    state_bytes = 0 if offloaded else 12 * numel // (ranks if stage >= 1 else 1)
    return weight_bytes + gradient_bytes + state_bytes


def _gradient_bytes(ds_config: Mapping[str, Any]) -> int:
    half = any((ds_config.get(key) or {}).get("enabled") for key in ("bf16", "fp16"))
    return 2 if half else 4


def reduction_keys(
    ds_config: dict[str, Any], config: AlstConfig, model: Any, group: dist.ProcessGroup
) -> tuple[dict[str, Any], str]:
    """The ds_config as DeepSpeed is to see it: what its buckets hold, and how many; the latter in words too."""
    ours = copy.deepcopy(ds_config)
    # Gradients go into the buckets as they are where they are summed in fp32; the user's own value is for SP 1.
    ours.pop("communication_data_type", None)
    if config.seq_parallel_communication_data_type != "fp32":
        ours["communication_data_type"] = config.seq_parallel_communication_data_type
    size, words = config.alst.reduction.bucket_size, "alst.reduction.bucket_size"
    if size == "auto":
        size, words = bucket_numel(model, ds_config, group)
    if size is None:
        return ours, "reduce_bucket_size"
    ours["zero_optimization"] = {**(ours.get("zero_optimization") or {}), "reduce_bucket_size": size}
    return ours, words

"""Number of elements of DeepSpeed's gradient buckets for ``alst.reduction.bucket_size`` ``"auto"``."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from deepspeed_alst.config.compatibility import zero_stage
from deepspeed_alst.distributed.collectives import ranks_on_host

# DeepSpeed's default; larger buckets gain nothing.
_MAX_BUCKET_ELEMENTS = 500_000_000
# Smaller buckets are bound by the collectives' latency.
_MIN_BUCKET_ELEMENTS = 1 << 20
# Buckets get 1/32 of the spare memory; activations need the rest.
_SPARE_SHARE = 32


def fitting_numel(ds_config: Mapping[str, Any], spare_bytes: int, numel: int) -> int:
    """Return the elements per bucket for ``spare_bytes`` of memory and ``numel`` gradient elements."""
    fitting = spare_bytes // _SPARE_SHARE // (num_buckets(ds_config) * _gradient_bytes(ds_config))
    return max(_MIN_BUCKET_ELEMENTS, min(fitting, _MAX_BUCKET_ELEMENTS, numel))


def num_buckets(ds_config: Mapping[str, Any]) -> int:
    """Return the number of alternating buckets: 2 if ZeRO 1 or 2 overlaps the reduction with the backward."""
    zero = ds_config.get("zero_optimization") or {}
    return 2 if zero.get("overlap_comm") and zero_stage(dict(ds_config)) < 3 else 1


def automatic_numel(model: Any, ds_config: dict[str, Any], group: dist.ProcessGroup) -> tuple[int, str]:
    """Return the bucket size, equal on all ranks, and a description of its derivation.

    The spare memory is what weights, gradients and Adam states will leave on the rank with the least. Source:
    arXiv:1910.02054, section 3.1: 12 bytes per parameter for fp32 weights, momentum and variance.
    """
    numel = sum(getattr(param, "ds_numel", param.numel()) for param in model.parameters() if param.requires_grad)
    zero = ds_config.get("zero_optimization") or {}
    stage, ranks, accelerator = zero_stage(ds_config), dist.get_world_size(), get_accelerator()
    away = [param for param in model.parameters() if param.device.type != accelerator.device_name()]
    weights = sum(param.numel() * param.element_size() for param in away) // (ranks if stage == 3 else 1)
    gradients = numel * _gradient_bytes(ds_config) // (ranks if stage >= 2 else 1)
    offloaded = (zero.get("offload_optimizer") or {}).get("device", "none") not in ("none", None)
    states = 0 if offloaded else 12 * numel // (ranks if stage >= 1 else 1)
    available = accelerator.available_memory() // (ranks_on_host(group) if accelerator.device_name() == "cpu" else 1)
    least = torch.tensor([available - weights - gradients - states], dtype=torch.int64)
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    spare = int(least.item())
    source = f"auto: 1/{_SPARE_SHARE} of {max(0, spare) / 2**30:.1f} GiB to spare, {numel:,} gradient elements"
    return fitting_numel(ds_config, spare, numel), source


def _gradient_bytes(ds_config: Mapping[str, Any]) -> int:
    return 2 if any((ds_config.get(key) or {}).get("enabled") for key in ("bf16", "fp16")) else 4

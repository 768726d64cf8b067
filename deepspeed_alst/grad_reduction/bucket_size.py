"""Number of elements of DeepSpeed's gradient buckets (``alst.reduction.bucket_size``)."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from deepspeed_alst.config.compatibility import zero_stage
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.distributed.collectives import ranks_on_host

# DeepSpeed's default; larger buckets gain nothing.
_MOST = 500_000_000
# Smaller buckets are bound by the collectives' latency.
_LEAST = 1 << 20
# Buckets get 1/32 of the spare memory; activations need the rest.
_SHARE = 32


def fitting_numel(ds_config: Mapping[str, Any], spare_bytes: int, numel: int) -> int:
    """Return the elements per bucket for ``spare_bytes`` of memory and ``numel`` gradient elements."""
    fitting = spare_bytes // _SHARE // (num_buckets(ds_config) * _gradient_bytes(ds_config))
    return max(_LEAST, min(fitting, _MOST, numel))


def num_buckets(ds_config: Mapping[str, Any]) -> int:
    """Return the number of alternating buckets: 2 if ZeRO 1 or 2 overlaps the reduction with the backward."""
    zero = ds_config.get("zero_optimization") or {}
    return 2 if zero.get("overlap_comm") and zero_stage(dict(ds_config)) < 3 else 1


def deepspeed_arguments(
    arguments: dict[str, Any], ds_config: dict[str, Any], config: AlstConfig, session: Any
) -> tuple[dict[str, Any], str]:
    """Return the arguments of DeepSpeed's call, and the source of its bucket size; at SP 1 they are the caller's."""
    if session is None:
        return arguments, ""
    ours = copy.deepcopy(ds_config)
    # Buckets keep the gradients' dtype if the sum is in fp32; the user's communication_data_type is for SP 1.
    ours.pop("communication_data_type", None)
    if config.seq_parallel_communication_data_type != "fp32":
        ours["communication_data_type"] = config.seq_parallel_communication_data_type
    size, source = config.alst.reduction.bucket_size, "alst.reduction.bucket_size"
    if size == "auto":
        size, source = _automatic_numel(arguments["model"], ds_config, session.groups.control_group)
    if size is None:
        source = "reduce_bucket_size"
    else:
        ours["zero_optimization"] = {**(ours.get("zero_optimization") or {}), "reduce_bucket_size": size}
    passed = {name: value for name, value in arguments.items() if name not in ("config_params", "training_data")}
    if arguments.get("config") is None and arguments.get("config_params") is None:
        # The config came in args. DeepSpeed rejects two, so `ours` replaces it there.
        args = copy.copy(arguments["args"])
        args.deepspeed_config, args.deepscale_config = ours, None
        return {**passed, "args": args, "mpu": session.mpu}, source
    return {**passed, "config": ours, "mpu": session.mpu}, source


def _automatic_numel(model: Any, ds_config: dict[str, Any], group: dist.ProcessGroup) -> tuple[int, str]:
    """Return the bucket size for ``"auto"``, equal on all ranks, and a description of its derivation.

    The memory is estimated before the engine is built: what weights, gradients and Adam states leave on the rank with
    the least. Source: arXiv:1910.02054, section 3.1: 12 bytes per parameter for fp32 weights, momentum and variance.
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
    spare = torch.tensor([available - weights - gradients - states], dtype=torch.int64)
    dist.all_reduce(spare, op=dist.ReduceOp.MIN, group=group)
    size = fitting_numel(ds_config, int(spare.item()), numel)
    spared = max(0, int(spare.item())) / 2**30
    return size, f"auto: 1/{_SHARE} of {spared:.1f} GiB to spare, {numel:,} gradient elements"


def _gradient_bytes(ds_config: Mapping[str, Any]) -> int:
    half = any((ds_config.get(key) or {}).get("enabled") for key in ("bf16", "fp16"))
    return 2 if half else 4

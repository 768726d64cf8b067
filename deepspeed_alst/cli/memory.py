"""Training memory by category, from the sizes of a model, a ds_config and a machine. Pure arithmetic.

Legend: N parameters, W ranks, P = sp_size, s tokens of a rank's shard, S of the whole sequence, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.config.parse import block_of
from deepspeed_alst.grad_reduction.bucket_size import fitting_numel, num_buckets

Sizes = dict[str, float]
"""Bytes by category."""
# Assumed bytes of torch, the CUDA context and NCCL's buffers on a GPU, which no allocator reports.
RESERVED = 3 * 2**30
_SLICES = 2
_STATES = {"adam": 8, "adamw": 8, "fusedadam": 8, "adagrad": 4, "lion": 4, "sgd": 0}
"""Bytes of optimizer state per element, in fp32."""


@dataclass(frozen=True)
class Layer:
    """Bytes one rank needs for its tokens, measured on a one-layer model: ``fixed + a_token * s``."""

    fixed: float
    a_token: float
    loss_fixed: float
    loss_a_token: float
    kept: float
    """Bytes per token and layer saved for the backward."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model."""

    num_params: int
    num_layers: int
    largest: int
    """Elements of the largest module that ZeRO 3 gathers at once: a layer, an embedding or the head."""


@dataclass(frozen=True)
class Machine:
    """GPUs and memory of the machine to plan for."""

    num_gpus: int
    gpu_bytes: float
    host_bytes: float
    gpus_of_host: int


@dataclass(frozen=True)
class Bucket:
    """Gradient bucket of DeepSpeed's reduction."""

    numel: int
    key: str
    """Config key that sets ``numel``."""
    auto: int
    """Number of elements under ``alst.reduction.bucket_size`` "auto" on this machine."""


def static_bytes(model: Model, ds_config: Mapping[str, Any], machine: Machine) -> tuple[Sizes, Sizes, Bucket]:
    """Return sequence-independent bytes by category of one GPU and of one rank on its host, and the bucket.

    ZeRO's arithmetic (arXiv 1910.02054, section 3): gradients are sharded from stage 2, weights from stage 3, optimizer
    states from stage 1.
    """
    zero = ds_config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    half = any((ds_config.get(dtype) or {}).get("enabled") for dtype in ("bf16", "fp16"))
    width = 2 if half else 4
    N, num_gpus = model.num_params, machine.num_gpus
    kind = str((ds_config.get("optimizer") or {}).get("type", "AdamW")).lower()
    states = N * (_STATES.get(kind, 8) + (4 if half else 0)) / (num_gpus if stage >= 1 else 1)
    gradients = N * width / (num_gpus if stage >= 2 else 1)
    weights = N * width / (num_gpus if stage == 3 else 1)
    gathered = 2 * model.largest * width if stage == 3 else 0  # weights, and their gradients before reduction
    reduction = block_of(ds_config).get("reduction") or {}
    device = {"weights": weights, "gradients": gradients, "optimizer": states, "gathered at once": gathered}
    host: dict[str, float] = {}
    if _device_of(zero, "offload_optimizer") == "cpu":
        # DeepSpeed also keeps its partition's fp32 gradients there, and under ZeRO 3 those in their own dtype.
        host["optimizer"] = device.pop("optimizer") + N * 4 / (num_gpus if stage >= 1 else 1)
        if stage >= 2:
            left = device.pop("gradients")
            host |= {"gradients": left} if stage == 3 else {}
    if _device_of(zero, "offload_param") == "cpu":
        host["weights"] = device.pop("weights")
    spare = machine.gpu_bytes - RESERVED - sum(device.get(key, 0) for key in ("weights", "gradients", "optimizer"))
    bucket = _bucket(ds_config, reduction.get("bucket_size"), fitting_numel(ds_config, int(spare), N))
    slices = _SLICES * _number(reduction.get("slice_bytes"), 64 * 2**20)
    in_buckets = num_buckets(ds_config) * min(bucket.numel, N) * width
    return device | {"gradient bucket and slices": in_buckets + slices, "reserved": RESERVED}, host, bucket


def _bucket(ds_config: Mapping[str, Any], own: Any, auto: int) -> Bucket:
    if own is not None:
        return Bucket(auto if own == "auto" else own, "alst.reduction.bucket_size", auto)
    size = (ds_config.get("zero_optimization") or {}).get("reduce_bucket_size")
    return Bucket(int(_number(size, 5e8)), "zero_optimization.reduce_bucket_size", auto)


def activation_bytes(model: Model, layer: Layer, tokens: int, offloads: bool) -> tuple[Sizes, Sizes]:
    """Return the sequence-dependent part, with checkpointed layers, at the higher of the layer and loss peaks."""
    waiting = (model.num_layers - 1) * layer.kept * tokens
    host = {"layers' inputs": waiting} if offloads else {}
    on_device = layer.kept * tokens if offloads else waiting
    in_layer = layer.fixed + layer.a_token * tokens
    in_loss = layer.loss_fixed + layer.loss_a_token * tokens + (0 if offloads else layer.kept * tokens)
    peak = "a layer's backward" if in_layer >= in_loss else "logits and loss"
    return {"layers' inputs": on_device, peak: max(in_layer, in_loss)}, host


@dataclass(frozen=True)
class Plan:
    """Sequence length and its memory."""

    tokens: int
    """s, tokens of one rank."""
    device: dict[str, float]
    """Bytes of one GPU by category."""
    host: dict[str, float]
    """Bytes of one host by category."""
    disk: float
    """Bytes on one host's ``nvme_path``, for which host memory has no room."""
    bucket: Bucket

    def over(self, machine: Machine) -> str:
        """Return the memory that is exceeded, "GPU" or "host"; empty if the plan fits."""
        if sum(self.device.values()) > machine.gpu_bytes:
            return "GPU"
        return "host" if sum(self.host.values()) > machine.host_bytes else ""


def plan_of(model: Model, layer: Layer, ds_config: Mapping[str, Any], machine: Machine, tokens: int) -> Plan:
    """Return the memory plan for a number of tokens per rank."""
    block = block_of(ds_config).get("activation_checkpoint_cpu_offload") or False
    device, host, bucket = static_bytes(model, ds_config, machine)
    for_tokens, on_host = activation_bytes(model, layer, tokens, bool(block))
    ranks = min(machine.gpus_of_host, machine.num_gpus)
    host, on_host = ({key: size * ranks for key, size in each.items()} for each in (host, on_host))
    on_disk = 0.0
    if isinstance(block, dict) and block.get("nvme_path"):
        waiting, room = sum(on_host.values()), max(0.0, machine.host_bytes - sum(host.values()))
        on_disk = max(0.0, waiting - room)
        on_host = {key: size - on_disk for key, size in on_host.items()}
    return Plan(tokens, device | for_tokens, host | on_host, on_disk, bucket)


def longest(model: Model, layer: Layer, ds_config: Mapping[str, Any], machine: Machine) -> tuple[Plan, str]:
    """Return the plan of the longest shard that fits and the binding memory; 0 tokens if not even weights fit."""
    low, high, binding = 0, 2**40, plan_of(model, layer, ds_config, machine, 2**40).over(machine)
    while high - low > 1:
        middle = (low + high) // 2
        over = plan_of(model, layer, ds_config, machine, middle).over(machine)
        low, high, binding = (low, middle, over) if over else (middle, high, binding)
    return plan_of(model, layer, ds_config, machine, low), binding


def _number(value: Any, default: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default


def _device_of(zero: Mapping[str, Any], key: str) -> str:
    return str((zero.get(key) or {}).get("device", "none"))

"""Bytes by category for a number of tokens, and the longest sequence that fits, of any machine.

Arithmetic on what measure.py counts, for decoders in half precision with checkpointed layers. Legend: N parameters,
P = sp_size, s tokens of a rank's shard.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepspeed_alst.cli.measure import Layer, Model
from deepspeed_alst.config.compatibility import value_at, zero_stage
from deepspeed_alst.config.schema import block_of, parse
from deepspeed_alst.grad_reduction.bucket_size import fitting_numel, num_buckets
from deepspeed_alst.offload.budget import count_saved, describe_output

GIB = 2**30
# Assumed bytes of torch, the CUDA context and NCCL's buffers on a GPU.
_RESERVED = 3 * GIB
_STATES = {"adam": 8, "adamw": 8, "fusedadam": 8, "adagrad": 4, "lion": 4, "sgd": 0}
"""Bytes of optimizer state per element, in fp32."""
Sizes = dict[str, float]
"""Bytes by category."""


@dataclass(frozen=True)
class Machine:
    """GPUs and memory of the machine to plan for."""

    num_gpus: int
    gpu_bytes: float
    """Bytes of a GPU that a run may use: without the margin."""
    host_bytes: float
    gpus_of_host: int

    @property
    def node_size(self) -> int:
        """Ranks of a host."""
        return min(self.gpus_of_host, self.num_gpus)


@dataclass(frozen=True)
class Plan:
    """Memory for ``tokens`` per rank: bytes of one GPU, of one host, and on its ``nvme_path``."""

    tokens: int
    device: Sizes
    host: Sizes
    disk: float
    num_saved: int
    """First layers whose attention output is kept for the backward."""
    attention: str
    """State of attention's output, and the reason."""

    def over(self, machine: Machine) -> str:
        """Return the memory that is exceeded, "GPU" or "host"; empty if the plan fits."""
        if sum(self.device.values()) > machine.gpu_bytes:
            return "GPU"
        return "host" if sum(self.host.values()) > machine.host_bytes else ""


def static_bytes(model: Model, ds_config: Mapping[str, Any], machine: Machine) -> tuple[Sizes, Sizes]:
    """Return the bytes that do not depend on the sequence, of one GPU and of one rank on its host.

    ZeRO's arithmetic (arXiv 1910.02054, section 3): gradients are sharded from stage 2, weights from stage 3, optimizer
    states from stage 1.
    """
    stage, N, num_gpus = zero_stage(ds_config), model.num_params, machine.num_gpus
    half = any(value_at(ds_config, f"{dtype}.enabled") for dtype in ("bf16", "fp16"))
    width = 2 if half else 4
    of_optimizer = _STATES.get(str(value_at(ds_config, "optimizer.type", "AdamW")).lower(), 8) + (4 if half else 0)
    device: Sizes = {
        "weights": N * width / (num_gpus if stage == 3 else 1),
        "gradients": N * width / (num_gpus if stage >= 2 else 1),
        "optimizer": N * of_optimizer / (num_gpus if stage >= 1 else 1),
        # Weights, and their gradients before reduction.
        "gathered weights": 2 * model.largest * width if stage == 3 else 0,
    }
    host: Sizes = {}
    if value_at(ds_config, "zero_optimization.offload_optimizer.device") == "cpu":
        # DeepSpeed also keeps its partition's fp32 gradients there, and under ZeRO 3 those in their own dtype.
        host["optimizer"] = device.pop("optimizer") + N * 4 / (num_gpus if stage >= 1 else 1)
        if stage >= 2:
            gradients = device.pop("gradients")
            host |= {"gradients": gradients} if stage == 3 else {}
    if value_at(ds_config, "zero_optimization.offload_param.device") == "cpu":
        host["weights"] = device.pop("weights")
    spare = machine.gpu_bytes - _RESERVED - sum(device.get(key, 0) for key in ("weights", "gradients", "optimizer"))
    reduction = block_of(ds_config).get("reduction") or {}
    bucket = reduction.get("bucket_size") or value_at(ds_config, "zero_optimization.reduce_bucket_size", "default")
    if reduction.get("bucket_size") == "auto":
        bucket = fitting_numel(ds_config, int(spare), N)
    elif isinstance(bucket, str):
        bucket = 5e8
    in_buckets = num_buckets(ds_config) * min(bucket, N) * width
    slices = 2 * reduction.get("slice_bytes", 64 * 2**20)
    return device | {"gradient buckets, slices": in_buckets + slices, "reserved": _RESERVED}, host


def plan_of(
    model: Model, measured: Mapping[bool, Layer], ds_config: Mapping[str, Any], machine: Machine, tokens: int
) -> Plan:
    """Return the memory plan for a number of tokens per rank, with checkpointed layers."""
    config = parse(ds_config)
    offload, layers = config.alst.activation_checkpoint_cpu_offload, model.layers
    device, on_host = static_bytes(model, ds_config, machine)
    ranks = machine.node_size
    host = {key: size * ranks for key, size in on_host.items()}
    room = max(0, int(machine.host_bytes - sum(host.values())))
    if not value_at(ds_config, "bf16.enabled"):
        layers = replace(layers, packing=False)
    wanted, sequence = config.alst.save_attention_output, tokens * config.sequence_parallel_size
    num_saved, why = layers.num_layers * (wanted is True), "save_attention_output"
    if offload is not None:
        num_saved, why = count_saved(layers, tokens, room // ranks, wanted, sequence)
    elif wanted == "auto":
        why = "auto: no offload"
    # Outputs of some layers only are on the device no longer than recomputed ones.
    keeps = num_saved == layers.num_layers
    layer, others = measured[keeps], layers.num_layers - 1
    if offload is not None:
        # Beside the layer in work, which is measured: the one that comes back, and the last ones at their end. Chunks
        # come back one by one.
        others = min(others, max(0 if layers.num_lean_layers else 1, layers.keep_last - 1))
    saved = {"layer inputs": layers.input_bytes, "attention outputs": layers.output_bytes + layers.lse_bytes}
    saved = saved if keeps else {"layer inputs": layers.input_bytes}
    device |= {name: others * size * tokens for name, size in saved.items() if others}
    peaks: list[Sizes] = [
        {"backward of a layer": layer.elsewhere.at(tokens)},
        {"backward of a layer": layer.attention.at(tokens), "attention kernel's workspace": layer.workspace.at(tokens)},
        {"logits and loss": layer.outside.at(tokens) + (0 if offload else layers.input_bytes * tokens)},
    ]
    device |= max(peaks, key=lambda peak: sum(peak.values()))
    disk = 0.0
    if offload is not None:
        layers = layers.resolve_packing(tokens, num_saved, room // ranks)
        inputs, total = (ranks * layers.offloaded_bytes(tokens, count) for count in (0, num_saved))
        disk = max(0.0, total - room) if offload.nvme_path else 0.0
        host["layer inputs"] = min(inputs, total - disk)
        if num_saved:
            host["attention outputs"] = total - disk - host["layer inputs"]
    attention = f"{describe_output(num_saved, layers.num_layers)} ({why})"
    return Plan(tokens, device, host, disk, num_saved, attention)


def longest(
    model: Model, measured: Mapping[bool, Layer], ds_config: Mapping[str, Any], machine: Machine
) -> tuple[Plan, str]:
    """Return the plan of the longest shard that fits, 0 tokens if none does, and the memory that limits it."""
    low, high, limit = 0, 2**40, plan_of(model, measured, ds_config, machine, 2**40).over(machine)
    while high - low > 1:
        middle = (low + high) // 2
        over = plan_of(model, measured, ds_config, machine, middle).over(machine)
        low, high, limit = (low, middle, over) if over else (middle, high, limit)
    return plan_of(model, measured, ds_config, machine, low), limit

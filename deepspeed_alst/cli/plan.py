"""``ds_alst plan``: longest sequence that fits, memory by category and the binding limit, for any machine.

One layer runs on tensors without data to count bytes per token (layer_memory.py); the rest is arithmetic. Covers
decoders in half precision with checkpointed layers. Legend: N parameters, P = sp_size, s tokens of a rank's shard.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.cli.report import problems, read_json
from deepspeed_alst.config.compatibility import value_at, zero_stage
from deepspeed_alst.config.parse import block_of, parse
from deepspeed_alst.errors import ConfigError

SUMMARY = "how long a sequence fits into a machine's memory, where the bytes go, and what binds"
EXAMPLES = """  ds_alst plan --model meta-llama/Llama-3.1-8B --ds_config ds.json --num_gpus 8 --gpu_memory 80
  ds_alst plan --model ./config.json --ds_config ds.json --seq_len 1048576 --json"""
_GIB = 2**30
# Assumed bytes of torch, the CUDA context and NCCL's buffers on a GPU, which no allocator reports.
_RESERVED = 3 * _GIB
_STATES = {"adam": 8, "adamw": 8, "fusedadam": 8, "adagrad": 4, "lion": 4, "sgd": 0}
"""Bytes of optimizer state per element, in fp32."""
Sizes = dict[str, float]
"""Bytes by category."""


@dataclass(frozen=True)
class Layer:
    """Bytes one rank needs for its s tokens, measured on a one-layer model: ``fixed + a_token * s``."""

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
class Plan:
    """Memory for a number of tokens per rank."""

    tokens: int
    device: Sizes
    """Bytes of one GPU."""
    host: Sizes
    """Bytes of one host."""
    disk: float
    """Bytes on one host's ``nvme_path``, for which host memory has no room."""

    def over(self, machine: Machine) -> str:
        """Return the memory that is exceeded, "GPU" or "host"; empty if the plan fits."""
        if sum(self.device.values()) > machine.gpu_bytes:
            return "GPU"
        return "host" if sum(self.host.values()) > machine.host_bytes else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ds_alst plan``."""
    parser.add_argument("--model", required=True, help="a config.json, a folder or a hub name")
    parser.add_argument("--ds_config", required=True, metavar="JSON", help="the ds_config to plan for")
    parser.add_argument("--num_gpus", type=int, default=8, help="all of them (8)")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB of one (80)")
    parser.add_argument("--host_memory", type=float, default=1800, help="GiB of one host (1800)")
    parser.add_argument("--gpus_per_host", type=int, default=8, help="of those of --num_gpus (8)")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence; default: as many as fit")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0 if the sequence fits, 1 if it does not.

    Raises:
        AlstError: the ds_config or the model cannot be planned for.
    """
    from deepspeed_alst.cli.layer_memory import measure

    ds_config = read_json(arguments.ds_config)
    if lines := problems(ds_config, arguments.num_gpus):
        raise ConfigError("\n".join(lines))
    config = parse(ds_config)
    P = config.sequence_parallel_size
    model, layer = measure(arguments.model, config)
    gpu_bytes, host_bytes = arguments.gpu_memory * _GIB, arguments.host_memory * _GIB
    machine = Machine(arguments.num_gpus, gpu_bytes, host_bytes, arguments.gpus_per_host)
    most, binding = longest(model, layer, ds_config, machine)
    tokens = most.tokens if arguments.seq_len is None else -(-arguments.seq_len // P)
    plan = plan_of(model, layer, ds_config, machine, tokens)
    fits = bool(most.tokens) and not plan.over(machine)
    if arguments.json:
        said = {
            "sequence": tokens * P,
            "longest": most.tokens * P,
            "bound by": binding,
            "fits": fits,
            "bytes of a GPU": plan.device,
            "bytes of a host": plan.host,
            "bytes of a host's disk": plan.disk,
            "bytes a token of a rank": layer.a_token,
            "kept a token and layer": layer.kept,
        }
        print(json.dumps(said, indent=1))
        return int(not fits)
    _print(plan, machine, P)
    print(f"The longest that fits has {most.tokens * P:,} tokens; the {binding}'s memory binds.")
    print("" if fits else "This one does not fit.")
    return int(not fits)


def static_bytes(model: Model, ds_config: Mapping[str, Any], machine: Machine) -> tuple[Sizes, Sizes]:
    """Return the bytes that do not depend on the sequence, of one GPU and of one rank on its host.

    ZeRO's arithmetic (arXiv 1910.02054, section 3): gradients are sharded from stage 2, weights from stage 3, optimizer
    states from stage 1.
    """
    from deepspeed_alst.grad_reduction.bucket_size import fitting_numel, num_buckets  # torch

    stage, N, num_gpus = zero_stage(ds_config), model.num_params, machine.num_gpus
    half = any(value_at(ds_config, f"{dtype}.enabled") for dtype in ("bf16", "fp16"))
    width = 2 if half else 4
    of_optimizer = _STATES.get(str(value_at(ds_config, "optimizer.type", "AdamW")).lower(), 8) + (4 if half else 0)
    device: Sizes = {
        "weights": N * width / (num_gpus if stage == 3 else 1),
        "gradients": N * width / (num_gpus if stage >= 2 else 1),
        "optimizer": N * of_optimizer / (num_gpus if stage >= 1 else 1),
        # Weights, and their gradients before reduction.
        "gathered at once": 2 * model.largest * width if stage == 3 else 0,
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
    return device | {"gradient bucket and slices": in_buckets + slices, "reserved": _RESERVED}, host


def plan_of(model: Model, layer: Layer, ds_config: Mapping[str, Any], machine: Machine, tokens: int) -> Plan:
    """Return the memory plan for a number of tokens per rank, with checkpointed layers."""
    offload = block_of(ds_config).get("activation_checkpoint_cpu_offload") or False
    device, on_host = static_bytes(model, ds_config, machine)
    ranks = min(machine.gpus_of_host, machine.num_gpus)
    host = {key: size * ranks for key, size in on_host.items()}
    one, waiting, disk = layer.kept * tokens, (model.num_layers - 1) * layer.kept * tokens, 0.0
    device["layers' inputs"] = one if offload else waiting
    in_layer = layer.fixed + layer.a_token * tokens
    in_loss = layer.loss_fixed + layer.loss_a_token * tokens + (0 if offload else one)
    device["a layer's backward" if in_layer >= in_loss else "logits and loss"] = max(in_layer, in_loss)
    if offload:
        room = max(0.0, machine.host_bytes - sum(host.values()))
        has_disk = isinstance(offload, dict) and offload.get("nvme_path")
        disk = max(0.0, waiting * ranks - room) if has_disk else 0.0
        host["layers' inputs"] = waiting * ranks - disk
    return Plan(tokens, device, host, disk)


def longest(model: Model, layer: Layer, ds_config: Mapping[str, Any], machine: Machine) -> tuple[Plan, str]:
    """Return the plan of the longest shard that fits and the binding memory; 0 tokens if not even weights fit."""
    low, high, binding = 0, 2**40, plan_of(model, layer, ds_config, machine, 2**40).over(machine)
    while high - low > 1:
        middle = (low + high) // 2
        over = plan_of(model, layer, ds_config, machine, middle).over(machine)
        low, high, binding = (low, middle, over) if over else (middle, high, binding)
    return plan_of(model, layer, ds_config, machine, low), binding


def _print(plan: Plan, machine: Machine, sp_size: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{plan.tokens * sp_size:,} tokens, {plan.tokens:,} on each of {sp_size} ranks")
    for column in ("", "GiB per GPU", "GiB per host"):
        table.add_column(column, justify="left" if not column else "right")
    for name in dict.fromkeys((*plan.device, *plan.host)):
        sizes = (each.get(name) for each in (plan.device, plan.host))
        table.add_row(name, *("" if size is None else f"{size / _GIB:,.1f}" for size in sizes))
    table.add_section()
    table.add_row("sum", *(f"{sum(each.values()) / _GIB:,.1f}" for each in (plan.device, plan.host)))
    table.add_row("available", *(f"{size / _GIB:,.1f}" for size in (machine.gpu_bytes, machine.host_bytes)))
    Console().print(table)
    if plan.disk:
        print(f"{plan.disk / _GIB:,.1f} GiB of layers' inputs per host go to nvme_path.")

"""``ds_alst plan``: longest sequence that fits, bytes by category and the limiting memory, for any machine.

One layer runs on fake tensors to count bytes per token; the rest is arithmetic, for decoders in half precision with
checkpointed layers. Legend: N parameters, P = sp_size, s tokens of a rank's shard.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.cli.report import problems, read_json
from deepspeed_alst.config.compatibility import value_at, zero_stage
from deepspeed_alst.config.schema import AlstConfig, block_of, parse
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError, ConfigError, UnsupportedModelError
from deepspeed_alst.grad_reduction.bucket_size import fitting_numel, num_buckets
from deepspeed_alst.integrations.hf_liger import use_liger_without_data
from deepspeed_alst.profiler.fake import Known, fake_world
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.tiling.tiled_loss import tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from deepspeed_alst.verification.hf_tiny_models import causal_lm, load_config, numel

_GIB = 2**30
# Assumed bytes of torch, the CUDA context and NCCL's buffers on a GPU.
_RESERVED = 3 * _GIB
_STATES = {"adam": 8, "adamw": 8, "fusedadam": 8, "adagrad": 4, "lion": 4, "sgd": 0}
"""Bytes of optimizer state per element, in fp32."""
_TOKENS = (32768, 65536)  # of the two measurements of the linear fit: more than any tile has
Sizes = dict[str, float]
"""Bytes by category."""


@dataclass(frozen=True)
class Layer:
    """Peak bytes of one rank in a layer and in the loss, measured on a one-layer model: ``fixed + a_token * s``."""

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
    """Memory for ``tokens`` per rank: bytes of one GPU, of one host, and on its ``nvme_path``."""

    tokens: int
    device: Sizes
    host: Sizes
    disk: float

    def over(self, machine: Machine) -> str:
        """Return the memory that is exceeded, "GPU" or "host"; empty if the plan fits."""
        if sum(self.device.values()) > machine.gpu_bytes:
            return "GPU"
        return "host" if sum(self.host.values()) > machine.host_bytes else ""


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0 if the sequence fits, else 1.

    Raises:
        AlstError: the ds_config or the model cannot be planned for.
    """
    ds_config = read_json(arguments.ds_config)
    if lines := problems(ds_config, arguments.num_gpus):
        raise ConfigError("\n".join(lines))
    config = parse(ds_config)
    P = config.sequence_parallel_size
    print(f"ds_alst plan: measuring layers of {arguments.model} on tensors without data", file=sys.stderr)
    model, layer = measure(arguments.model, config)
    gpu_bytes, host_bytes = arguments.gpu_memory * _GIB, arguments.host_memory * _GIB
    machine = Machine(arguments.num_gpus, gpu_bytes, host_bytes, arguments.gpus_per_host)
    most, limit = longest(model, layer, ds_config, machine)
    tokens = most.tokens if arguments.seq_len is None else -(-arguments.seq_len // P)
    plan = plan_of(model, layer, ds_config, machine, tokens)
    fits = bool(most.tokens) and not plan.over(machine)
    if arguments.json:
        result = {
            "sequence": tokens * P,
            "longest": most.tokens * P,
            "bound by": limit,
            "fits": fits,
            "bytes of a GPU": plan.device,
            "bytes of a host": plan.host,
            "bytes of a host's disk": plan.disk,
            "bytes a token of a rank": layer.a_token,
            "kept a token and layer": layer.kept,
        }
        print(json.dumps(result, indent=1))
    else:
        _print(plan, machine, P)
        if not fits:
            print(f"A sequence of {tokens * P:,} tokens does not fit.")
        print(f"The longest sequence that fits has {most.tokens * P:,} tokens, limited by {limit} memory.")
    return int(not fits)


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


def plan_of(model: Model, layer: Layer, ds_config: Mapping[str, Any], machine: Machine, tokens: int) -> Plan:
    """Return the memory plan for a number of tokens per rank, with checkpointed layers."""
    offload = block_of(ds_config).get("activation_checkpoint_cpu_offload") or False
    device, on_host = static_bytes(model, ds_config, machine)
    ranks = min(machine.gpus_of_host, machine.num_gpus)
    host = {key: size * ranks for key, size in on_host.items()}
    one, waiting, disk = layer.kept * tokens, (model.num_layers - 1) * layer.kept * tokens, 0.0
    device["layer inputs"] = one if offload else waiting
    in_layer = layer.fixed + layer.a_token * tokens
    in_loss = layer.loss_fixed + layer.loss_a_token * tokens + (0 if offload else one)
    device["backward of a layer" if in_layer >= in_loss else "logits and loss"] = max(in_layer, in_loss)
    if offload:
        room = max(0.0, machine.host_bytes - sum(host.values()))
        has_disk = isinstance(offload, dict) and offload.get("nvme_path")
        disk = max(0.0, waiting * ranks - room) if has_disk else 0.0
        host["layer inputs"] = waiting * ranks - disk
    return Plan(tokens, device, host, disk)


def longest(model: Model, layer: Layer, ds_config: Mapping[str, Any], machine: Machine) -> tuple[Plan, str]:
    """Return the plan of the longest shard that fits, 0 tokens if none does, and the memory that limits it."""
    low, high, limit = 0, 2**40, plan_of(model, layer, ds_config, machine, 2**40).over(machine)
    while high - low > 1:
        middle = (low + high) // 2
        over = plan_of(model, layer, ds_config, machine, middle).over(machine)
        low, high, limit = (low, middle, over) if over else (middle, high, limit)
    return plan_of(model, layer, ds_config, machine, low), limit


def _print(plan: Plan, machine: Machine, sp_size: int) -> None:
    print(f"{plan.tokens * sp_size:,} tokens, {plan.tokens:,} per rank at SP {sp_size}")
    rows = {name: (plan.device.get(name), plan.host.get(name)) for name in {**plan.device, **plan.host}}
    rows["total"] = sum(plan.device.values()), sum(plan.host.values())
    rows["available"] = machine.gpu_bytes, machine.host_bytes
    print(f"{'':28}{'GiB per GPU':>14}{'GiB per host':>14}")
    for name, sizes in rows.items():
        print(f"{name:28}" + "".join(f"{'' if size is None else f'{size / _GIB:,.1f}':>14}" for size in sizes))
    if plan.disk:
        print(f"{plan.disk / _GIB:,.1f} GiB of layer inputs per host are on nvme_path.")


# --- one layer on fake tensors


def measure(name: str, keys: AlstConfig) -> tuple[Model, Layer]:
    """Return a model's sizes, and the bytes of one layer on one of P ranks with the ds_config's tiles."""
    whole = load_config(name, small=False).get_text_config()
    num_layers = getattr(whole, "num_hidden_layers", 0)
    if not num_layers:
        raise ConfigError(f"--model {name}: its config has no num_hidden_layers; give a decoder's")
    one, two = (_with_layers(whole, count) for count in (1, 2))
    largest = max(numel(causal_lm, two) - numel(causal_lm, one), whole.vocab_size * whole.hidden_size)
    a, b = _TOKENS
    (few_in, few_out, few_kept), (many_in, many_out, _) = (bytes_of(one, keys, tokens) for tokens in _TOKENS)
    *_, two_kept = bytes_of(two, keys, a)
    slope, loss_slope = (many_in - few_in) / (b - a), max(0.0, (many_out - few_out) / (b - a))
    return Model(numel(causal_lm, whole), num_layers, largest), Layer(
        fixed=max(0.0, few_in - slope * a),
        a_token=slope,
        loss_fixed=max(0.0, few_out - loss_slope * a),
        loss_a_token=loss_slope,
        kept=(two_kept - few_kept) / a,
    )


def bytes_of(config: Any, keys: AlstConfig, tokens: int) -> tuple[int, int, int]:
    """Measure a rank's peak bytes in layers and outside, and those kept for the backward, in bf16 for s ``tokens``.

    Layers are checkpointed; weights and their gradients are not counted.

    Raises:
        UnsupportedModelError: the model does not run on fake tensors.
    """
    try:
        with fake_world(keys.sequence_parallel_size), PatchSet() as patches:
            model, calls = causal_lm(config).train(), ForwardContext()
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            spec = ModelSpec(model)
            experts = max(spec.expert_counts, default=0)
            per_expert = tokens * (getattr(config, "num_experts_per_tok", 1) or 1) // experts if experts else 0
            patch_model(spec, dist.group.WORLD, patches, calls)
            use_liger_without_data(spec, keys, patches)  # as on a GPU
            if keys.alst.tiled_mlp_compute is not None:
                tile_mlps(spec, keys.alst.tiled_mlp_compute, lambda module: None, patches)
            if (loss := keys.tiled_loss()) is not None:
                tile_loss(spec, loss, calls, lambda module: None, patches)
            ids = torch.arange(tokens).remainder(config.vocab_size)[None]
            batch = {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "labels": ids, "shift_labels": ids}
            with Known(tokens, per_expert):
                # Not measured: patches may still set themselves up in the first step.
                model(**batch, use_cache=False).loss.backward()
                model.zero_grad()
                return _peaks(spec, batch)
    except Exception as error:
        if isinstance(error, AlstError):
            raise
        raise UnsupportedModelError(
            f"--model: cannot be planned for, as it fails on fake tensors with {type(error).__name__}: "
            f"{str(error).splitlines()[0][:100]}"
        ) from error


def _peaks(spec: ModelSpec, batch: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    def beside_weights(sample: Any) -> int:
        return int(sample.total - sample.bytes["weights"] - sample.bytes["gradients"])

    with Ledger(spec.model) as ledger:
        loss = spec.model(**batch, use_cache=False).loss
        kept = beside_weights(ledger.timeline[-1])
        loss.backward()
    layers = tuple(f"{name}." for name in spec.layers)
    peaks = {True: 0, False: 0}
    for sample in ledger.timeline:
        inside = f"{sample.moment.module}.".startswith(layers)
        peaks[inside] = max(peaks[inside], beside_weights(sample))
    return peaks[True], peaks[False], kept


def _with_layers(config: Any, count: int) -> Any:
    """Return a config with layers of the last layer's kind, which usually attends to the whole sequence."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:] * count
    return config

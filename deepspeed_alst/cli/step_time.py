"""Time of an optimizer step by its parts, from counts and stated rates: arithmetic, not measured.

Copies and weight gathers run beside the computation of their pass, and count where they take longer; all-to-alls and
the gradient reduction do not overlap. Not counted: kernels other than matrix products and attention, launches, data.
Legend: N parameters, P = sp_size, S tokens of a sequence, s = S/P.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from deepspeed_alst.cli.measure import Layer, Model
from deepspeed_alst.cli.memory import Machine, Plan
from deepspeed_alst.config.compatibility import GAS, MICRO, TOTAL, value_at, zero_stage
from deepspeed_alst.config.schema import parse

NVLINK, NETWORK = 450e9, 50e9
"""Bytes per second that a GPU sends within a host (an H100's NVLink) and to others (a 400 Gb/s link each)."""
# Per element the host's Adam reads and writes 16 and 12 bytes of fp32 and writes 2 of bf16, at a host's 200 GB/s.
_ADAM_BYTES, _HOST_MEMORY = 30, 200e9
# Matrix products of attention's backward kernel, which computes the scores again, relative to its forward's.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Rates:
    """Rates of a GPU per second: FLOPs, and bytes to GPUs and its host; and of the host's disk."""

    flops: float
    link: float | None
    """None: NVLINK for a group within a host, else NETWORK."""
    host_link: float
    disk: float

    def to_gpus(self, num_ranks: int, machine: Machine) -> float:
        """Return the bytes per second between the GPUs of a group."""
        return self.link or (NVLINK if num_ranks <= machine.gpus_of_host else NETWORK)


class Part(NamedTuple):
    """Seconds of one part of a step, and those of them that do not overlap with computation."""

    seconds: float
    exposed: float


@dataclass(frozen=True)
class StepTime:
    """Parts of an optimizer step."""

    parts: dict[str, Part]
    micro_steps: int
    model_flops: float
    """Model FLOPs of a GPU in the step, as in MFU: without recomputation."""

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(part.exposed for part in self.parts.values())


def step_time(
    model: Model, layer: Layer, ds_config: Mapping[str, Any], machine: Machine, plan: Plan, rates: Rates
) -> StepTime | None:
    """Return the time of an optimizer step at the plan's length; None if the config lacks a size for attention."""
    if model.step is None:
        return None
    P, G = parse(ds_config).sequence_parallel_size, machine.num_gpus
    s, count, steps = plan.tokens, model.layers.num_layers, micro_steps(ds_config, G // P)
    pairs = sum(layers * span.seen_by_all(s * P) for span, layers in model.step.spans)
    attention = model.step.pair / 3 * pairs / P * model.imbalance  # the rank with the most heads
    matrices = s * count * layer.flops.layer
    again = 1 - plan.num_saved / count
    forward = (s * count * layer.flops.forward + attention) / rates.flops
    backward = (matrices + attention * (1 + again + _ATTENTION_BACKWARD)) / rates.flops - forward
    parts = {
        "matrix products": Part(*[(matrices + s * layer.flops.head) / rates.flops] * 2),
        "attention": Part(*[attention * (1 + again + _ATTENTION_BACKWARD) / rates.flops] * 2),
        # Forward, recomputation and backward; with attention's output saved, the backward sends it instead.
        "all-to-all": Part(*[3 * s * count * model.exchanged / rates.to_gpus(P, machine)] * 2),
    }
    stage, per_step = zero_stage(ds_config), dict[str, Part]()
    reduction = Part(*[_reduced(model.num_params, stage, G) / rates.to_gpus(G, machine)] * 2)
    (parts if stage >= 2 else per_step)["gradient reduction"] = reduction
    for name, (out, back) in _overlapping(model, ds_config, machine, plan, rates).items():
        parts[name] = Part(out + back, max(0.0, out - forward) + max(0.0, back - backward))
    if value_at(ds_config, "zero_optimization.offload_optimizer.device") == "cpu":
        ours, ranks = model.num_params / (G if stage else 1), min(machine.gpus_of_host, G)
        seconds = ours * ranks * _ADAM_BYTES / _HOST_MEMORY + 2 * ours / rates.host_link
        per_step["optimizer on the host"] = Part(seconds, seconds)
    of_step = {name: Part(*(steps * each for each in part)) for name, part in parts.items()} | per_step
    return StepTime(of_step, steps, steps * model.step.model(s * P, pairs) / P)


def micro_steps(ds_config: Mapping[str, Any], replicas: int) -> int:
    """Return the micro-steps of an optimizer step; 1 if the batch keys do not say."""
    total, micro, steps = (ds_config.get(key) for key in (TOTAL, MICRO, GAS))
    if isinstance(steps, int | float):
        return int(steps)
    given = isinstance(total, int | float) and isinstance(micro, int | float)
    return max(1, int(total // micro // replicas)) if given else 1  # type: ignore[operator]


def _reduced(N: int, stage: int, num_ranks: int) -> float:
    """Return the bytes that a rank sends to reduce bf16 gradients (docs/reduction.md)."""
    return (2 if stage == 3 else 4) * N * (num_ranks - 1) / num_ranks


def _overlapping(
    model: Model, ds_config: Mapping[str, Any], machine: Machine, plan: Plan, rates: Rates
) -> dict[str, tuple[float, float]]:
    """Return the seconds of what overlaps with computation, in the forward and in the backward of a micro-step."""
    N, G, stage = model.num_params, machine.num_gpus, zero_stage(ds_config)
    found = {}
    if stage == 3:
        gather = 2 * N * (G - 1) / G / rates.to_gpus(G, machine)
        found["weight gathers"] = gather, gather
    on_host = {
        key: value_at(ds_config, f"zero_optimization.offload_{key}.device") == "cpu" for key in ("optimizer", "param")
    }
    to_host = from_host = 0.0
    if parse(ds_config).alst.activation_checkpoint_cpu_offload is not None:
        to_host = from_host = float(model.layers.offloaded_bytes(plan.tokens, plan.num_saved))
    weights = 2 * N / G if on_host["param"] else 0.0
    gradients = 2 * N / (G if stage >= 2 else 1) if on_host["optimizer"] else 0.0
    copies = {
        "copies to the host": (to_host, gradients),
        "copies from the host": (weights, from_host + weights),
    }
    found |= {name: (out / rates.host_link, back / rates.host_link) for name, (out, back) in copies.items()}
    found["disk"] = plan.disk / rates.disk, plan.disk / rates.disk
    if (lean := parse(ds_config).alst.memory_lean_layer) is not None and (g := model.kv_parts) > 1:
        # A chunk's queries need nearly all keys; their gradients, in fp32, are reduced as they are gathered.
        keys, chunks = plan.tokens * parse(ds_config).sequence_parallel_size, -(-plan.tokens // lean.chunk_tokens)
        once = model.layers.num_layers * chunks * keys * model.kv_bytes * (g - 1) / g / rates.to_gpus(g, machine)
        found["gathers of K and V"] = once, (3 + 1 - plan.num_saved / model.layers.num_layers) * once
    return {name: seconds for name, seconds in found.items() if any(seconds)}

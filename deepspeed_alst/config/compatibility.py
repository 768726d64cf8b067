"""DeepSpeed's keys under sequence parallelism: values read before DeepSpeed reads them, and refused features. Pure.

``docs/compatibility.md`` is the table of features, and every row has a test: a "right" row trains and is compared with
SP=1, a "refused" row raises ConfigError. What DeepSpeed has removed it refuses itself.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown

Config = Mapping[str, Any]
_BLOCKS = ("bf16", "fp16", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")
_MISSING = object()


def value_at(ds_config: Any, path: str, default: Any = None) -> Any:
    """Return the value at a dotted JSON path, or the default if any part is missing."""
    for part in path.split("."):
        if not isinstance(ds_config, Mapping) or part not in ds_config:
            return default
        ds_config = ds_config[part]
    return ds_config


def zero_stage(ds_config: Config) -> int:
    """Return the ZeRO stage as DeepSpeed reads it: ``"3"`` is 3, and ``"auto"`` its default.

    Raises:
        ConfigError: the stage does not exist, or ``zero_optimization`` is not an object.
    """
    block = ds_config.get("zero_optimization")
    if block is not None and not isinstance(block, Mapping):
        raise ConfigError(f'zero_optimization: must be an object such as {{"stage": 3}} (got {shown(block)}).')
    stage = value_at(ds_config, "zero_optimization.stage", 0)
    if stage == "auto":
        return 0
    if not isinstance(stage, int | float | str) or stage not in (0, 1, 2, 3, "0", "1", "2", "3"):
        raise ConfigError(f"zero_optimization.stage: use 0, 1, 2 or 3 (got {shown(stage)}).")
    return int(stage)


def wrong_blocks(ds_config: Config) -> list[str]:
    """Return a line for each block that is not an object, and for two half precisions at once."""
    lines = [
        f"{path}: must be an object (got {shown(block)})."
        for path in _BLOCKS
        if not isinstance(block := value_at(ds_config, path), Mapping | None)
    ]
    if value_at(ds_config, "bf16.enabled") is True and value_at(ds_config, "fp16.enabled") is True:
        lines.append("fp16.enabled=true: bf16.enabled is true too; leave one of them out.")
    return lines


def check_numbers(ds_config: Config) -> None:
    """Raise ConfigError for values of steps_per_print or gradient_clipping that would fail in the middle of a step."""
    lines = []
    steps, clipping = ds_config.get("steps_per_print"), ds_config.get("gradient_clipping", "auto")
    # accelerate uses infinity for never.
    if steps not in (None, math.inf) and not is_count(steps):
        lines.append(f"steps_per_print: must be a whole number above 0, or null for never (got {shown(steps)}).")
    if clipping != "auto" and (type(clipping) not in (int, float) or not clipping >= 0):
        lines.append(f"gradient_clipping: must be a number, 0 for none (got {shown(clipping)}).")
    if lines:
        raise ConfigError("\n".join(lines))


def is_count(value: Any) -> bool:
    """Return True for a positive whole number, which JSON may write as 5e8."""
    return type(value) in (int, float) and value >= 1 and value % 1 == 0


def idle_checkpointing(ds_config: Config) -> str:
    """Return a warning if DeepSpeed's activation checkpointing is set, which these models ignore; else empty."""
    block = ds_config.get("activation_checkpointing")
    for key, value in block.items() if isinstance(block, Mapping) else ():
        if value:
            return (
                f"activation_checkpointing.{key}={shown(value)} does nothing: transformers checkpoints layers by "
                "PyTorch's function, not by DeepSpeed's. alst.activation_checkpoint_cpu_offload puts checkpoints on "
                "the host"
            )
    return ""


@dataclass(frozen=True)
class Feature:
    """One row: name, JSON path, predicate on its value, and the reason to reject it (empty if supported)."""

    name: str
    path: str
    enables: Callable[[Any], bool]
    refusal: str = ""
    also: Callable[[Config], bool] = lambda ds_config: True
    """Further condition on the ds_config."""

    def asked(self, ds_config: Config) -> bool:
        """Return True if the ds_config enables the feature; a key that is not there enables nothing."""
        value = value_at(ds_config, self.path, _MISSING)
        return value is not _MISSING and self.enables(value) and self.also(ds_config)


# Predicates on a value. In most blocks "auto" is DeepSpeed's default, which enables nothing.


def _on(value: Any) -> bool:
    return value != "auto" and bool(value.get("enabled", False) if isinstance(value, Mapping) else value)


def _is(*words: Any) -> Callable[[Any], bool]:
    return lambda value: (value.lower() if isinstance(value, str) else value) in words


def _is_not(*words: Any) -> Callable[[Any], bool]:
    return lambda value: value not in words


def _samples_data(block: Any) -> bool:
    # DeepSpeed's engine reads the inner switches, not the outer one.
    inner = ("data_sampling.curriculum_learning", "data_routing.random_ltd")
    return _on(block) or any(_on(value_at(block, path)) for path in inner)


def _has_autosp(passes: Any) -> bool:
    return isinstance(passes, list | tuple) and "autosp" in passes


# Conditions on the ds_config.


def _at(*stages: int) -> Callable[[Config], bool]:
    """Return a condition on the ZeRO stage: other stages do not read the key."""
    words = (*stages, *map(str, stages))
    return lambda ds_config: value_at(ds_config, "zero_optimization.stage", 0) in words


def _alone(ds_config: Config) -> bool:
    return "seq_parallel_communication_data_type" not in ds_config


def _muon_on_zero_1_with_bf16(ds_config: Config) -> bool:
    return _MUON.asked(ds_config) and _BF16.asked(ds_config) and zero_stage(ds_config) == 1


_given, _above_one = _is_not(None, "auto"), _is_not(None, "auto", 0, 1, "0", "1")
_ZERO = "zero_optimization"
_UNVERIFIED = "not verified under sequence parallelism; remove it, or set sequence_parallel_size to 1"
_REMOVED = "DeepSpeed 0.19.8 has it no more, with or without sequence parallelism; remove it"
_QUANTIZED = "quantized weights do not give the gradients of the run without it; remove it"
_NVME = 'not verified under sequence parallelism; use device "cpu"'
_BF16 = Feature("bf16", "bf16", _on)
_MUON = Feature("Muon", "optimizer.type", _is("muon"))

FEATURES = (
    Feature("fp16", "fp16", _on),
    _BF16,
    Feature(
        "torch autocast",
        "torch_autocast",
        _on,
        "gradients are not reduced in seq_parallel_communication_data_type; use bf16.enabled",
    ),
    Feature("gradient clipping", "gradient_clipping", _on),
    Feature(
        "prescale_gradients", "prescale_gradients", _on, "it divides before the sum, which rounds twice; remove it"
    ),
    Feature(
        "gradient_predivide_factor",
        "gradient_predivide_factor",
        _is_not(1, None),
        "DeepSpeed 0.19 divides wrongly at stage 3; remove it",
    ),
    Feature("gradient_allreduce_op", "gradient_allreduce_op", _is("sum"), "replicas must be averaged; remove it"),
    Feature("optimizer offload to CPU", f"{_ZERO}.offload_optimizer.device", _is("cpu")),
    Feature("optimizer offload to NVMe", f"{_ZERO}.offload_optimizer.device", _is("nvme"), _NVME),
    Feature("parameter offload to CPU", f"{_ZERO}.offload_param.device", _is("cpu")),
    Feature("parameter offload to NVMe", f"{_ZERO}.offload_param.device", _is("nvme"), _NVME, _at(3)),
    Feature("reduce_scatter off", f"{_ZERO}.reduce_scatter", _is(False)),
    Feature("contiguous_gradients off", f"{_ZERO}.contiguous_gradients", _is(False)),
    Feature("overlap_comm", f"{_ZERO}.overlap_comm", _on),
    Feature(
        "round_robin_gradients",
        f"{_ZERO}.round_robin_gradients",
        _on,
        "DeepSpeed 0.19.8 cannot read full gradients beside it; remove it",
        _at(1, 2),
    ),
    Feature("fp32 gradient accumulation", "data_types.grad_accum_dtype", _is("fp32")),
    Feature(
        "communication_data_type",
        "communication_data_type",
        _given,
        "use seq_parallel_communication_data_type, beside it or instead",
        _alone,
    ),
    Feature("hpZ (ZeRO++)", f"{_ZERO}.zero_hpz_partition_size", _above_one, _UNVERIFIED, _at(3)),
    Feature("qwZ (ZeRO++)", f"{_ZERO}.zero_quantized_weights", _on, _QUANTIZED, _at(3)),
    Feature("qwZ for frozen weights (ZeRO++)", f"{_ZERO}.zero_quantized_nontrainable_weights", _on, _QUANTIZED, _at(3)),
    Feature("qgZ (ZeRO++)", f"{_ZERO}.zero_quantized_gradients", _on, "gradients would be summed in 4 bits; remove it"),
    # Any block enables it, even an empty one.
    Feature("ZenFlow", f"{_ZERO}.zenflow", _given, _UNVERIFIED),
    Feature("SuperOffload", f"{_ZERO}.offload_optimizer.super_offload", _on, _UNVERIFIED, _at(3)),
    Feature("AutoTP", "tensor_parallel.autotp_size", _above_one, "it would split the attention heads too; remove it"),
    Feature("AutoEP", "expert_parallel", _on, _UNVERIFIED),
    Feature("pipeline parallelism", "pipeline", bool, "a PipelineModule has no sequence dimension to split; use ZeRO"),
    Feature("1-bit optimizers", "optimizer.type", _is("onebitadam", "zerooneadam", "onebitlamb"), _REMOVED),
    _MUON,
    Feature(
        "Muon on ZeRO 1 with bf16 gradients accumulated in fp32",
        "data_types.grad_accum_dtype",
        _is("fp32"),
        "it takes no mpu; use zero_optimization.stage 2, or remove it",
        _muon_on_zero_1_with_bf16,
    ),
    Feature("DeepCompile", "compile.deepcompile", _on, _UNVERIFIED),
    Feature(
        "AutoSP", "compile.passes", _has_autosp, "it is sequence parallelism too; remove the pass, or the alst block"
    ),
    Feature("checkpoint writer", "checkpoint.writer", _given, "it asks for a data-parallel group; remove it"),
    Feature("data_efficiency", "data_efficiency", _samples_data, "it draws and cuts the samples itself; remove it"),
    Feature("hybrid_engine", "hybrid_engine", _on, _UNVERIFIED),
    Feature("autotuning", "autotuning", _on, _UNVERIFIED),
    Feature("unmanaged gradient accumulation", "managed_gradient_accumulation", lambda value: not value, _UNVERIFIED),
    Feature(
        "data_parallel_size mesh",
        "data_parallel_size",
        _given,
        "DeepSpeed then reduces over the data ranks only; remove it",
    ),
)


def check_features(ds_config: Config) -> None:
    """Raise ConfigError if a feature does not work with sequence parallelism: a line each, with the remedy."""
    lines = wrong_blocks(ds_config)
    for feature in FEATURES:
        if feature.refusal and feature.asked(ds_config):
            value = shown(value_at(ds_config, feature.path))
            lines.append(f"{feature.path}={value} ({feature.name}): {feature.refusal}.")
    if lines:
        raise ConfigError("\n".join(lines))

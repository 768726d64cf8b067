"""DeepSpeed's features under sequence parallelism: supported, or rejected with the key's name. Pure.

A row is a feature, the value of a key that enables it, and the verdict. ``docs/compatibility.md`` is this table, and
every row has a test: a "right" row trains and is compared with SP=1, a "refused" row raises ConfigError.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.config.ds_values import Config, value_at, wrong_blocks, zero_stage
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown

_MISSING = object()


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


def _given(value: Any) -> bool:
    return value not in (None, "auto")


def _above_one(value: Any) -> bool:
    try:
        # DeepSpeed reads "2" as 2; the negation includes NaN.
        return _given(value) and not float(value) <= 1
    except (TypeError, ValueError, OverflowError):  # not a number: counts as enabled
        return True


def _is(*words: Any) -> Callable[[Any], bool]:
    return lambda value: (value.lower() if isinstance(value, str) else value) in words


def _samples_data(block: Any) -> bool:
    # DeepSpeed's engine reads the inner switches, not the outer one.
    inner = ("data_sampling.curriculum_learning", "data_routing.random_ltd")
    return _on(block) or any(_on(value_at(block, path)) for path in inner)


# Conditions on the ds_config.


def _at(*stages: int) -> Callable[[Config], bool]:
    """Return a condition on the ZeRO stage: other stages do not read the key."""
    words = (*stages, *map(str, stages))
    return lambda ds_config: value_at(ds_config, "zero_optimization.stage", 0) in words


def _muon_on_zero_1_with_bf16(ds_config: Config) -> bool:
    return _MUON.asked(ds_config) and _BF16.asked(ds_config) and zero_stage(ds_config) == 1


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
        "it reduces gradients in a dtype of its own, so seq_parallel_communication_data_type could not be honoured; "
        "use bf16.enabled",
    ),
    Feature("gradient clipping", "gradient_clipping", _on),
    Feature(
        "prescale_gradients", "prescale_gradients", _on, "it divides before the sum, which rounds twice; remove it"
    ),
    Feature(
        "gradient_predivide_factor",
        "gradient_predivide_factor",
        lambda value: value not in (1, None),
        "DeepSpeed 0.19 divides by the wrong number where the factor equals the world size (stage 3); remove it",
    ),
    Feature(
        "gradient_allreduce_op",
        "gradient_allreduce_op",
        _is("sum"),
        "a sum over all ranks has no SP=1 equal: the ranks of one sequence must be summed and the replicas averaged; "
        "remove it",
    ),
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
        "DeepSpeed 0.19.8 cannot read full gradients beside it (safe_get_full_grad fails on one rank, the others "
        "wait), and the check of the averaging at the first step reads them; remove it, or set sequence_parallel_size "
        "to 1",
        _at(1, 2),
    ),
    Feature("fp32 gradient accumulation", "data_types.grad_accum_dtype", _is("fp32")),
    Feature(
        "communication_data_type",
        "communication_data_type",
        _given,
        "it is for runs without sequence parallelism; use seq_parallel_communication_data_type (beside it, or instead)",
        lambda ds_config: "seq_parallel_communication_data_type" not in ds_config,
    ),
    Feature("hpZ (ZeRO++)", f"{_ZERO}.zero_hpz_partition_size", _above_one, _UNVERIFIED, _at(3)),
    Feature("qwZ (ZeRO++)", f"{_ZERO}.zero_quantized_weights", _on, _QUANTIZED, _at(3)),
    Feature("qwZ for frozen weights (ZeRO++)", f"{_ZERO}.zero_quantized_nontrainable_weights", _on, _QUANTIZED, _at(3)),
    Feature(
        "qgZ (ZeRO++)",
        f"{_ZERO}.zero_quantized_gradients",
        _on,
        "gradients would be summed in 4 bits whatever seq_parallel_communication_data_type says; remove it",
    ),
    Feature("LoCo (ZeRO++)", f"{_ZERO}.zeropp_loco_param", _given, _REMOVED),
    Feature("MiCS", f"{_ZERO}.mics_shard_size", _given, _REMOVED),
    # Any block enables it, even an empty one.
    Feature("ZenFlow", f"{_ZERO}.zenflow", _given, _UNVERIFIED),
    Feature("SuperOffload", f"{_ZERO}.offload_optimizer.super_offload", _on, _UNVERIFIED, _at(3)),
    Feature(
        "AutoTP",
        "tensor_parallel.autotp_size",
        _above_one,
        "tensor and sequence parallelism would both split the attention heads; remove one of the two",
    ),
    Feature("AutoEP", "expert_parallel", _on, _UNVERIFIED),
    Feature(
        "pipeline parallelism",
        "pipeline",
        bool,
        "a PipelineModule has no sequence dimension that this package could split; use ZeRO",
    ),
    Feature("1-bit optimizers", "optimizer.type", _is("onebitadam", "zerooneadam", "onebitlamb"), _REMOVED),
    _MUON,
    Feature(
        "Muon on ZeRO 1 with bf16 gradients accumulated in fp32",
        "data_types.grad_accum_dtype",
        _is("fp32"),
        "DeepSpeed's optimizer for it takes no mpu; use zero_optimization.stage 2, or remove it",
        _muon_on_zero_1_with_bf16,
    ),
    Feature("DeepCompile", "compile.deepcompile", _on, _UNVERIFIED),
    Feature(
        "AutoSP",
        "compile.passes",
        lambda passes: isinstance(passes, list | tuple) and "autosp" in passes,
        "it is sequence parallelism too; remove the pass, or the alst block",
    ),
    Feature(
        "checkpoint writer",
        "checkpoint.writer",
        _given,
        "it asks for a data-parallel group, where all ranks share the states; remove it",
    ),
    Feature("sparse gradients", "sparse_gradients", _given, _REMOVED),
    Feature("data_efficiency", "data_efficiency", _samples_data, "it draws and cuts the samples itself; remove it"),
    Feature("curriculum_learning", "curriculum_learning", _given, _REMOVED),
    Feature("hybrid_engine", "hybrid_engine", _on, _UNVERIFIED),
    Feature("autotuning", "autotuning", _on, _UNVERIFIED),
    Feature("unmanaged gradient accumulation", "managed_gradient_accumulation", lambda value: not value, _UNVERIFIED),
    Feature(
        "data_parallel_size mesh",
        "data_parallel_size",
        _given,
        "DeepSpeed then reduces over the data ranks only and the weights diverge; remove it: "
        "data parallelism is the world size divided by sequence_parallel_size",
    ),
)


def check_features(ds_config: Config) -> None:
    """Raise ConfigError if a feature does not work with sequence parallelism.

    Raises:
        ConfigError: one line per rejected feature: JSON path, value, reason, remedy.
    """
    lines = wrong_blocks(ds_config)
    for feature in FEATURES:
        if feature.refusal and feature.asked(ds_config):
            value = shown(value_at(ds_config, feature.path))
            lines.append(f"{feature.path}={value} ({feature.name}): {feature.refusal}.")
    if lines:
        raise ConfigError("\n".join(lines))

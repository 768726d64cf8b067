"""DeepSpeed's features under sequence parallelism: supported, or rejected with the key's name. Pure.

A row is a feature, the ds_config that enables it, and the verdict. ``docs/compatibility.md`` is this table, and every
row has a test: a "right" row trains and is compared with SP=1, a "refused" row raises ConfigError with its message.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.deepspeed_values import Config, value_at, wrong_blocks, zero_stage
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.words import shown


@dataclass(frozen=True)
class Feature:
    """One row: name, JSON path, predicate on the ds_config, and the reason to reject it (empty if supported)."""

    name: str
    path: str
    asked: Callable[[Config], bool]
    refusal: str = ""


def _setting(ds_config: Config, path: str) -> Any:
    """Return the value at a path; None for "auto", DeepSpeed's default, which enables nothing."""
    value = value_at(ds_config, path)
    return None if value == "auto" else value


def _on(path: str) -> Callable[[Config], bool]:
    def asked(ds_config: Config) -> bool:
        value = _setting(ds_config, path)
        return bool(value.get("enabled", False) if isinstance(value, Mapping) else value)

    return asked


def _given(path: str) -> Callable[[Config], bool]:
    return lambda ds_config: _setting(ds_config, path) is not None


def _above_one(path: str) -> Callable[[Config], bool]:
    def asked(ds_config: Config) -> bool:
        value = _setting(ds_config, path)
        try:
            # DeepSpeed reads "2" as 2; the negation includes NaN.
            return value is not None and not float(value) <= 1
        except (TypeError, ValueError, OverflowError):  # not a number: counts as enabled
            return True

    return asked


def _at(*stages: int) -> Callable[[Callable[[Config], bool]], Callable[[Config], bool]]:
    """Restrict a predicate to these ZeRO stages; other stages do not read the key."""
    words = {*stages, *map(str, stages)}
    return lambda asked: lambda c: value_at(c, "zero_optimization.stage", 0) in words and asked(c)


def _one_of(path: str, word: str) -> Callable[[Config], bool]:
    """Return a predicate for a list that contains a word."""

    def asked(ds_config: Config) -> bool:
        value = value_at(ds_config, path)
        return isinstance(value, list | tuple) and word in value

    return asked


def _optimizer(*names: str) -> Callable[[Config], bool]:
    return lambda ds_config: str(value_at(ds_config, "optimizer.type", "")).lower() in names


def _is(path: str, value: Any) -> Callable[[Config], bool]:
    return lambda ds_config: _lower(value_at(ds_config, path)) == value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


_FP32_ACCUMULATION = _is("data_types.grad_accum_dtype", "fp32")
_UNVERIFIED = "not verified under sequence parallelism; remove it, or set sequence_parallel_size to 1"
_REMOVED = "DeepSpeed 0.19.8 has it no more, with or without sequence parallelism; remove it"

FEATURES = (
    Feature("fp16", "fp16", _on("fp16")),
    Feature("bf16", "bf16", _on("bf16")),
    Feature(
        "torch autocast",
        "torch_autocast",
        _on("torch_autocast"),
        "it reduces gradients in a dtype of its own, so seq_parallel_communication_data_type could not be honoured; "
        "use bf16.enabled",
    ),
    Feature("gradient clipping", "gradient_clipping", _on("gradient_clipping")),
    Feature(
        "prescale_gradients",
        "prescale_gradients",
        _on("prescale_gradients"),
        "it divides before the sum, which rounds twice; remove it",
    ),
    Feature(
        "gradient_predivide_factor",
        "gradient_predivide_factor",
        lambda c: value_at(c, "gradient_predivide_factor", 1.0) not in (1, None),
        "DeepSpeed 0.19 divides by the wrong number where the factor equals the world size (stage 3); remove it",
    ),
    Feature(
        "gradient_allreduce_op",
        "gradient_allreduce_op",
        _is("gradient_allreduce_op", "sum"),
        "a sum over all ranks has no SP=1 equal: the ranks of one sequence must be summed and the replicas averaged; "
        "remove it",
    ),
    Feature(
        "optimizer offload to CPU",
        "zero_optimization.offload_optimizer",
        _is("zero_optimization.offload_optimizer.device", "cpu"),
    ),
    Feature(
        "optimizer offload to NVMe",
        "zero_optimization.offload_optimizer.device",
        _is("zero_optimization.offload_optimizer.device", "nvme"),
        'not verified under sequence parallelism; use device "cpu"',
    ),
    Feature(
        "parameter offload to CPU",
        "zero_optimization.offload_param",
        _is("zero_optimization.offload_param.device", "cpu"),
    ),
    Feature(
        "parameter offload to NVMe",
        "zero_optimization.offload_param.device",
        _at(3)(_is("zero_optimization.offload_param.device", "nvme")),
        'not verified under sequence parallelism; use device "cpu"',
    ),
    Feature("reduce_scatter off", "zero_optimization.reduce_scatter", _is("zero_optimization.reduce_scatter", False)),
    Feature(
        "contiguous_gradients off",
        "zero_optimization.contiguous_gradients",
        _is("zero_optimization.contiguous_gradients", False),
    ),
    Feature("overlap_comm", "zero_optimization.overlap_comm", _on("zero_optimization.overlap_comm")),
    Feature(
        "round_robin_gradients",
        "zero_optimization.round_robin_gradients",
        _at(1, 2)(_on("zero_optimization.round_robin_gradients")),
        "DeepSpeed 0.19.8 cannot read full gradients beside it (safe_get_full_grad fails on one rank, the others "
        "wait), and the check of the averaging at the first step reads them; remove it, or set sequence_parallel_size "
        "to 1",
    ),
    Feature("fp32 gradient accumulation", "data_types.grad_accum_dtype", _FP32_ACCUMULATION),
    Feature(
        "communication_data_type",
        "communication_data_type",
        lambda c: _given("communication_data_type")(c) and "seq_parallel_communication_data_type" not in c,
        "it is for runs without sequence parallelism; use seq_parallel_communication_data_type (beside it, or instead)",
    ),
    Feature(
        "hpZ (ZeRO++)",
        "zero_optimization.zero_hpz_partition_size",
        _at(3)(_above_one("zero_optimization.zero_hpz_partition_size")),
        _UNVERIFIED,
    ),
    Feature(
        "qwZ (ZeRO++)",
        "zero_optimization.zero_quantized_weights",
        _at(3)(_on("zero_optimization.zero_quantized_weights")),
        "quantized weights do not give the gradients of the run without it; remove it",
    ),
    Feature(
        "qwZ for frozen weights (ZeRO++)",
        "zero_optimization.zero_quantized_nontrainable_weights",
        _at(3)(_on("zero_optimization.zero_quantized_nontrainable_weights")),
        "quantized weights do not give the gradients of the run without it; remove it",
    ),
    Feature(
        "qgZ (ZeRO++)",
        "zero_optimization.zero_quantized_gradients",
        _on("zero_optimization.zero_quantized_gradients"),
        "gradients would be summed in 4 bits whatever seq_parallel_communication_data_type says; remove it",
    ),
    Feature(
        "LoCo (ZeRO++)",
        "zero_optimization.zeropp_loco_param",
        _given("zero_optimization.zeropp_loco_param"),
        _REMOVED,
    ),
    Feature("MiCS", "zero_optimization.mics_shard_size", _given("zero_optimization.mics_shard_size"), _REMOVED),
    # Any block enables it, even an empty one.
    Feature("ZenFlow", "zero_optimization.zenflow", _given("zero_optimization.zenflow"), _UNVERIFIED),
    Feature(
        "SuperOffload",
        "zero_optimization.offload_optimizer.super_offload",
        _at(3)(_on("zero_optimization.offload_optimizer.super_offload")),
        _UNVERIFIED,
    ),
    Feature(
        "AutoTP",
        "tensor_parallel.autotp_size",
        _above_one("tensor_parallel.autotp_size"),
        "tensor and sequence parallelism would both split the attention heads; remove one of the two",
    ),
    Feature("AutoEP", "expert_parallel", _on("expert_parallel"), _UNVERIFIED),
    Feature(
        "pipeline parallelism",
        "pipeline",
        lambda c: bool(value_at(c, "pipeline")),
        "a PipelineModule has no sequence dimension that this package could split; use ZeRO",
    ),
    Feature("1-bit optimizers", "optimizer.type", _optimizer("onebitadam", "zerooneadam", "onebitlamb"), _REMOVED),
    Feature("Muon", "optimizer.type", _optimizer("muon")),
    Feature(
        "Muon on ZeRO 1 with bf16 gradients accumulated in fp32",
        "data_types.grad_accum_dtype",
        lambda c: _optimizer("muon")(c) and zero_stage(c) == 1 and _on("bf16")(c) and _FP32_ACCUMULATION(c),
        "DeepSpeed's optimizer for it takes no mpu; use zero_optimization.stage 2, or remove it",
    ),
    Feature("DeepCompile", "compile.deepcompile", _on("compile.deepcompile"), _UNVERIFIED),
    Feature(
        "AutoSP",
        "compile.passes",
        _one_of("compile.passes", "autosp"),
        "it is sequence parallelism too; remove the pass, or the alst block",
    ),
    Feature(
        "checkpoint writer",
        "checkpoint.writer",
        _given("checkpoint.writer"),
        "it asks for a data-parallel group, where all ranks share the states; remove it",
    ),
    Feature("sparse gradients", "sparse_gradients", _given("sparse_gradients"), _REMOVED),
    Feature(
        "data_efficiency",
        "data_efficiency",
        # DeepSpeed's engine reads the inner switches, not the outer one.
        lambda c: any(
            _on(f"data_efficiency{inner}")(c)
            for inner in ("", ".data_sampling.curriculum_learning", ".data_routing.random_ltd")
        ),
        "it draws and cuts the samples itself; remove it",
    ),
    Feature("curriculum_learning", "curriculum_learning", _given("curriculum_learning"), _REMOVED),
    Feature("hybrid_engine", "hybrid_engine", _on("hybrid_engine"), _UNVERIFIED),
    Feature("autotuning", "autotuning", _on("autotuning"), _UNVERIFIED),
    Feature(
        "unmanaged gradient accumulation",
        "managed_gradient_accumulation",
        lambda c: not value_at(c, "managed_gradient_accumulation", True),
        _UNVERIFIED,
    ),
    Feature(
        "data_parallel_size mesh",
        "data_parallel_size",
        _given("data_parallel_size"),
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

"""DeepSpeed's keys under sequence parallelism: refused features, and sizes against the ranks and the model. Pure.

``docs/compatibility.md`` lists the features that work and those in ``REFUSED``; every row has a test.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown

Config = Mapping[str, Any]
TOTAL, MICRO, GAS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_MISSING = object()


def value_at(ds_config: Any, path: str, default: Any = None) -> Any:
    """Return the value at a dotted JSON path, or the default if any part is missing."""
    for part in path.split("."):
        if not isinstance(ds_config, Mapping) or part not in ds_config:
            return default
        ds_config = ds_config[part]
    return ds_config


def zero_stage(ds_config: Config) -> int:
    """Return the ZeRO stage as DeepSpeed reads it (``"3"`` is 3, ``"auto"`` 0); raise ConfigError if it is none."""
    block = ds_config.get("zero_optimization")
    if not isinstance(block, Mapping | None):
        raise ConfigError(f'zero_optimization: must be an object such as {{"stage": 3}} (got {shown(block)}).')
    stage = value_at(ds_config, "zero_optimization.stage", 0)
    if stage == "auto":
        return 0
    if not isinstance(stage, int | float | str) or stage not in (0, 1, 2, 3, "0", "1", "2", "3"):
        raise ConfigError(f"zero_optimization.stage: use 0, 1, 2 or 3 (got {shown(stage)}).")
    return int(stage)


@dataclass(frozen=True)
class Feature:
    """A refused feature: name, JSON path, predicate on the value there, and the reason with the remedy."""

    name: str
    path: str
    enables: Callable[[Any], bool]
    refusal: str
    also: Callable[[Config], bool] = lambda ds_config: True
    """Further condition on the ds_config."""

    def asked(self, ds_config: Config) -> bool:
        """Return True if the ds_config enables the feature; a missing key enables nothing."""
        value = value_at(ds_config, self.path, _MISSING)
        return value is not _MISSING and self.enables(value) and self.also(ds_config)


# Predicates on a value. In most blocks "auto" is DeepSpeed's default, which enables nothing.


def _on(value: Any) -> bool:
    return value != "auto" and bool(value.get("enabled", False) if isinstance(value, Mapping) else value)


def _is(word: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value.lower() == word


def _is_not(*words: Any) -> Callable[[Any], bool]:
    return lambda value: value not in words


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
    is_muon = _is("muon")(value_at(ds_config, "optimizer.type"))
    return is_muon and _on(ds_config.get("bf16")) and zero_stage(ds_config) == 1


_given, _above_one = _is_not(None, "auto"), _is_not(None, "auto", 0, 1, "0", "1")
_ZERO = "zero_optimization"
_UNVERIFIED = "not verified under sequence parallelism; remove it, or set sequence_parallel_size to 1"
_QUANTIZED = "quantized weights change the gradients; remove it"
_NVME = 'not verified under sequence parallelism; use device "cpu"'

REFUSED = (
    Feature(
        "torch autocast",
        "torch_autocast",
        _on,
        "gradients would not be reduced in seq_parallel_communication_data_type; use bf16.enabled",
    ),
    Feature("prescale_gradients", "prescale_gradients", _on, "divides before the sum, which rounds twice; remove it"),
    Feature(
        "gradient_predivide_factor",
        "gradient_predivide_factor",
        _is_not(1, None),
        "DeepSpeed 0.19 divides wrongly at ZeRO stage 3; remove it",
    ),
    Feature("gradient_allreduce_op", "gradient_allreduce_op", _is("sum"), "gradients must be averaged; remove it"),
    Feature("optimizer offload to NVMe", f"{_ZERO}.offload_optimizer.device", _is("nvme"), _NVME),
    Feature("parameter offload to NVMe", f"{_ZERO}.offload_param.device", _is("nvme"), _NVME, _at(3)),
    Feature(
        "round_robin_gradients",
        f"{_ZERO}.round_robin_gradients",
        _on,
        "DeepSpeed 0.19.8 cannot return full gradients with it; remove it",
        _at(1, 2),
    ),
    Feature(
        "communication_data_type",
        "communication_data_type",
        _given,
        "not used under sequence parallelism; use seq_parallel_communication_data_type, with or without it",
        lambda ds_config: "seq_parallel_communication_data_type" not in ds_config,
    ),
    Feature("hpZ (ZeRO++)", f"{_ZERO}.zero_hpz_partition_size", _above_one, _UNVERIFIED, _at(3)),
    Feature("qwZ (ZeRO++)", f"{_ZERO}.zero_quantized_weights", _on, _QUANTIZED, _at(3)),
    Feature("qwZ for frozen weights (ZeRO++)", f"{_ZERO}.zero_quantized_nontrainable_weights", _on, _QUANTIZED, _at(3)),
    Feature("qgZ (ZeRO++)", f"{_ZERO}.zero_quantized_gradients", _on, "sums gradients in 4 bits; remove it"),
    # Any block enables it, even an empty one.
    Feature("ZenFlow", f"{_ZERO}.zenflow", _given, _UNVERIFIED),
    Feature("SuperOffload", f"{_ZERO}.offload_optimizer.super_offload", _on, _UNVERIFIED, _at(3)),
    Feature("AutoTP", "tensor_parallel.autotp_size", _above_one, "splits the attention heads too; remove it"),
    Feature("AutoEP", "expert_parallel", _on, _UNVERIFIED),
    Feature("pipeline parallelism", "pipeline", bool, "a PipelineModule has no sequence dimension to split; use ZeRO"),
    Feature(
        "Muon on ZeRO 1 with bf16 gradients accumulated in fp32",
        "data_types.grad_accum_dtype",
        _is("fp32"),
        "its optimizer takes no mpu; use zero_optimization.stage 2, or remove it",
        _muon_on_zero_1_with_bf16,
    ),
    Feature("DeepCompile", "compile.deepcompile", _on, _UNVERIFIED),
    Feature(
        "AutoSP",
        "compile.passes",
        lambda passes: isinstance(passes, list | tuple) and "autosp" in passes,
        "is sequence parallelism too; remove the pass, or the alst block",
    ),
    Feature("checkpoint writer", "checkpoint.writer", _given, "needs a data-parallel group; remove it"),
    Feature("data_efficiency", "data_efficiency", _samples_data, "draws and cuts the samples itself; remove it"),
    Feature("hybrid_engine", "hybrid_engine", _on, _UNVERIFIED),
    Feature("autotuning", "autotuning", _on, _UNVERIFIED),
    Feature("unmanaged gradient accumulation", "managed_gradient_accumulation", lambda value: not value, _UNVERIFIED),
    Feature(
        "data_parallel_size mesh",
        "data_parallel_size",
        _given,
        "DeepSpeed would average gradients over the data-parallel ranks only; remove it",
    ),
)
"""DeepSpeed's features that are not right under sequence parallelism, in the order of docs/compatibility.md."""


def check_features(ds_config: Config) -> None:
    """Raise ConfigError if a feature does not work with sequence parallelism: a line each, with the remedy."""
    lines = [
        f"{each.path}={shown(value_at(ds_config, each.path))} ({each.name}): {each.refusal}."
        for each in REFUSED
        if each.asked(ds_config)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


# --- sizes


def fitting(world_size: int, scans: Sequence[int] = ()) -> list[int]:
    """Return the SP degrees that fit the ranks and the heads of scans. A world size of 0 (unknown) allows every one."""
    return [degree for degree in range(1, min(scans, default=world_size) + 1) if world_size % degree == 0]


def check_world(config: AlstConfig, world_size: int, heads: Iterable[tuple[int, int, str]] = ()) -> None:
    """Raise ConfigError, with the valid SP degrees, if this one does not divide the ranks or exceeds a scan's heads.

    ``heads`` are the model's, if known: query heads, KV heads and their owner. Attention takes any degree.
    """
    sp_size, scans = config.sequence_parallel_size, [num_heads for num_heads, _, of in heads if of != "attention"]
    way_out = f"Use one of {fitting(world_size, scans)}"
    if world_size % sp_size:
        raise ConfigError(
            f"sequence_parallel_size={shown(sp_size)} does not divide the world size ({world_size} ranks). {way_out}."
        )
    if sp_size > min(scans, default=sp_size):
        raise ConfigError(
            f"sequence_parallel_size={shown(sp_size)} exceeds the model's {min(scans)} heads of a scan, of which each "
            f"rank of a sequence needs one. {way_out}; the remaining ranks become data-parallel replicas."
        )


def check_batch_keys(ds_config: Config, sp_size: int, world_size: int) -> None:
    """Raise ConfigError if the batch size keys are inconsistent or not numbers, with the value to change.

    Missing ones are derived like in DeepSpeed (_set_batch_related_parameters). Under sequence parallelism a micro-step
    is one rank's batch.
    """
    given = {name: ds_config[name] for name in (TOTAL, MICRO, GAS) if ds_config.get(name) is not None}
    wrong = [
        f'{name}: must be a positive whole number; only the HF Trainer fills in "auto" (got {shown(value)}).'
        for name, value in given.items()
        if type(value) not in (int, float) or not value >= 1 or value % 1
    ]
    if not wrong and not {TOTAL, MICRO} & given.keys():
        wrong = [f"{MICRO}: missing, and {TOTAL} too; set it to the number of samples in a rank's batch."]
    if wrong:
        raise ConfigError("\n".join(wrong))
    replicas = world_size // sp_size
    # 0 is a missing one.
    total, micro, accumulation = (int(given.get(name, 0)) for name in (TOTAL, MICRO, GAS))
    if MICRO not in given:
        accumulation = accumulation or 1
        micro = total // replicas // accumulation
    elif GAS not in given:
        accumulation = total // micro // replicas if total else 1
    product = micro * accumulation * replicas
    if product and total in (0, product):
        return
    fits = micro and total % (micro * replicas) == 0
    ways = [f"{GAS} to {total // (micro * replicas)}, which keeps the samples per step"] if fits else []
    ways += [f"{TOTAL} to {product or f'a multiple of {replicas}'}"]
    raise ConfigError(
        f"{TOTAL}={total} is not {MICRO}={micro} x {GAS}={accumulation} x {replicas} replica(s) = {product}. With "
        f"sequence_parallel_size={sp_size}, {world_size} ranks are {replicas} replica(s); the batches of a replica's "
        f"{sp_size} ranks take {sp_size} micro-steps, which {GAS} counts. Set {', or '.join(ways)}."
    )

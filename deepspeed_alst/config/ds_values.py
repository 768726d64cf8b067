"""Values of DeepSpeed's keys that this package reads before DeepSpeed does, and its batch arithmetic. Pure.

Under sequence parallelism a micro-step is one rank's batch.
"""

import math
from collections.abc import Mapping
from typing import Any

from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown

Config = Mapping[str, Any]

TOTAL, MICRO, GAS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
_BLOCKS = ("bf16", "fp16", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")


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
    """Raise ConfigError for numbers that would fail in the middle of a step.

    Raises:
        ConfigError: ``steps_per_print`` is not a positive integer, or ``gradient_clipping`` is not a number.
    """
    lines = []
    steps, clipping = ds_config.get("steps_per_print"), ds_config.get("gradient_clipping", "auto")
    # accelerate uses infinity for never.
    if steps not in (None, math.inf) and not _is_count(steps):
        lines.append(f"steps_per_print: must be a whole number above 0, or null for never (got {shown(steps)}).")
    if clipping != "auto" and (type(clipping) not in (int, float) or not clipping >= 0):
        lines.append(f"gradient_clipping: must be a number, 0 for none (got {shown(clipping)}).")
    if lines:
        raise ConfigError("\n".join(lines))


def _is_count(value: Any) -> bool:
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


def check_batch_keys(ds_config: Config, sp_size: int, world_size: int) -> None:
    """Raise ConfigError if the batch size keys are inconsistent, with the value to change.

    Missing ones are derived like in DeepSpeed (_set_batch_related_parameters).

    Raises:
        ConfigError: none is given, one is not a positive integer, or their product differs.
    """
    given = {name: ds_config[name] for name in (TOTAL, MICRO, GAS) if ds_config.get(name) is not None}
    wrong = [
        f'{name}: must be a positive whole number; "auto" is filled in by the HF Trainer alone (got {shown(value)}).'
        for name, value in given.items()
        if not _is_count(value)
    ]
    if not wrong and not {TOTAL, MICRO} & given.keys():
        wrong = [f"{MICRO}: is not given, and no {TOTAL} either; set it to the samples of a rank's batch."]
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
    ways = [f"{GAS} to {total // (micro * replicas)}, which keeps the samples of a step"] if fits else []
    ways += [f"{TOTAL} to {product or f'a multiple of {replicas}'}"]
    raise ConfigError(
        f"{TOTAL}={total} is not {MICRO}={micro} x {GAS}={accumulation} x {replicas} replica(s) = {product}. With "
        f"sequence_parallel_size={sp_size} the {world_size} ranks are {replicas} replica(s) of {sp_size}: the ranks of "
        f"a sequence work on one rank's batch at a time, so that a batch of each rank is {sp_size} micro-steps, and "
        f"{GAS} counts micro-steps. Set {', or '.join(ways)}."
    )


def step_words(micro: int, accumulation: int, sp_size: int, replicas: int, multiple: int) -> str:
    """Describe an optimizer step: samples, micro-steps, tokens and padding."""
    words = (
        f"{micro * accumulation * replicas} samples: {accumulation} micro-steps of {micro} on {replicas} replica(s); a "
        f"micro-step is {micro} x {multiple // sp_size} tokens of a rank or a multiple, padding included"
    )
    if accumulation % sp_size:
        words += (
            f"; {accumulation} micro-steps are no multiple of sequence_parallel_size={sp_size}, so that some steps end "
            "between the batches that the ranks drew together"
        )
    return words

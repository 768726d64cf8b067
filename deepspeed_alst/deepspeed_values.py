"""Values of DeepSpeed's keys that this package reads before DeepSpeed does. Pure."""

import math
from collections.abc import Mapping
from typing import Any

from deepspeed_alst.errors import ConfigError
from deepspeed_alst.words import shown

Config = Mapping[str, Any]

_BLOCKS = ("bf16", "fp16", "zero_optimization.offload_optimizer", "zero_optimization.offload_param")


def value_at(ds_config: Config, path: str, default: Any = None) -> Any:
    """Return the value at a dotted JSON path, or the default if any part is missing."""
    value: Any = ds_config
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value


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
        if (block := value_at(ds_config, path)) is not None and not isinstance(block, Mapping)
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
    steps = ds_config.get("steps_per_print")
    # accelerate uses infinity for never.
    if steps is not None and (type(steps) not in (int, float) or steps < 1 or (math.isfinite(steps) and steps % 1)):
        lines.append(f"steps_per_print: must be a whole number above 0, or null for never (got {shown(steps)}).")
    clipping = ds_config.get("gradient_clipping", "auto")
    if clipping != "auto" and (type(clipping) not in (int, float) or not clipping >= 0):
        lines.append(f"gradient_clipping: must be a number, 0 for none (got {shown(clipping)}).")
    if lines:
        raise ConfigError("\n".join(lines))


def idle_checkpointing(ds_config: Config) -> str:
    """Return a warning if DeepSpeed's activation checkpointing is set, which these models ignore; else empty."""
    block = ds_config.get("activation_checkpointing")
    set_here = [each for each in block.items() if each[1]] if isinstance(block, Mapping) else []
    if not set_here:
        return ""
    key, value = set_here[0]
    return (
        f"activation_checkpointing.{key}={shown(value)} does nothing: transformers checkpoints "
        "layers by PyTorch's function, not by DeepSpeed's. alst.activation_checkpoint_cpu_offload puts checkpoints on "
        "the host"
    )

"""Parsing of this package's part of a ds_config, and checks of the run's sizes. Pure: no torch, no I/O.

``parse`` checks the keys alone, ``check_world`` and ``check_batch_keys`` against the number of ranks, ``check_heads``
against the model. Each reports all problems in one ConfigError, a line per key: JSON path, value, remedy.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from deepspeed_alst.config.compatibility import is_count
from deepspeed_alst.config.config_file import (
    DEEPSPEED_KEYS,
    OURS,
    TOP_KEYS,
    correction,
    near_misses,
    nearest,
    place_of,
)
from deepspeed_alst.config.schema import BLOCKS, AlstBlockConfig, AlstConfig
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import as_word, shown

TOTAL, MICRO, GAS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
# Union types: pydantic inserts the chosen member into the error path.
_UNIONS = ("tiled_logits_loss", "liger_kernel")

# Full paths of the inner blocks' keys.
_NESTED = {
    key: " or ".join(f"alst.{name}.{key}" for name, block in BLOCKS.items() if key in block.model_fields)
    for block in BLOCKS.values()
    for key in block.model_fields
}

# Ranks with different values of these keys would deadlock or diverge.
SAME_ON_ALL_RANKS = (
    *AlstConfig.model_fields,
    *TOP_KEYS,
    "zero_optimization",
    "data_types",
    "bf16",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def parse(ds_config: Mapping[str, Any]) -> AlstConfig:
    """Parse this package's keys of a ds_config.

    Raises:
        ConfigError: keys are unknown, out of range or unavailable; one line per key.
    """
    beside = [key for key in TOP_KEYS if key in ds_config]
    problems = [*near_misses(ds_config, _NESTED)]
    given = {name: ds_config[name] for name in AlstConfig.model_fields if name in ds_config}
    if isinstance(block := ds_config.get("alst", {}), Mapping):
        given["alst"] = block_of(ds_config)
        problems += [
            f"{key}: stands in the alst block too, as alst.{key}; leave one of them out."
            for key in beside
            if key in block
        ]
    try:
        config = AlstConfig.model_validate(given)
    except ValidationError as error:
        problems += [_line(each, beside) for each in error.errors() if not _is_other_member(each)]
    else:
        sp_size, multiple = config.sequence_parallel_size, config.padding_multiple()
        if multiple % sp_size:
            problems.append(
                f"alst.pad_to_multiple_of={shown(multiple)} is not a multiple of "
                f'sequence_parallel_size={shown(sp_size)}. Use {shown(-(-multiple // sp_size) * sp_size)}, or "auto".'
            )
        if not problems:
            return config
    raise ConfigError("\n".join(problems))


def block_of(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``alst`` block merged with ALST's own names at the top level."""
    return {key: ds_config[key] for key in TOP_KEYS if key in ds_config} | dict(ds_config.get("alst") or {})


def _is_other_member(error: Any) -> bool:
    """Return True if a value that may be an object or "auto" is reported as not "auto"."""
    return error["type"] == "literal_error" and str(error["loc"][-1]).startswith("literal[")


def _line(error: Any, beside: Sequence[str]) -> str:
    """Format one pydantic error; keys in ``beside`` are at the top level."""
    loc = [str(part) for part in error["loc"]]
    if len(loc) > 2 and loc[1] in _UNIONS:
        del loc[2]
    unknown = error["type"] == "extra_forbidden"
    owner = loc[:-1] if unknown else loc
    block = BLOCKS.get(owner[1], AlstBlockConfig) if len(owner) > 1 else AlstBlockConfig
    words = [as_word(part) for part in loc[len(loc) > 1 and loc[1] in beside :]]
    path, parent = ".".join(words), ".".join(words[:-1])
    if unknown:
        own = {name: f"{parent}.{name}" for name in block.model_fields}
        place = place_of(loc[-1], {**{name: name for name in DEEPSPEED_KEYS}, **_NESTED, **OURS, **own})
        return correction(parent, loc[-1], place) if place else f"{path}: unknown key.{nearest(loc[-1], own)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "model_type":
        message = f"must be an object of {', '.join(block.model_fields)}"
    return f"{path}: {message} (got {shown(error['input'])})."


def _fits(degree: int, num_heads: int, num_kv_heads: int) -> bool:
    """Return True if an SP degree can split these heads."""
    return num_heads % degree == 0 and (num_kv_heads % degree == 0 or degree % num_kv_heads == 0)


def _fitting(world_size: int, heads: Sequence[tuple[int, int, str]]) -> list[int]:
    """Return the SP degrees that fit the ranks and the heads. A world size of 0 (unknown) allows every degree."""
    largest = max([world_size, *(each[0] for each in heads)])
    return [
        degree
        for degree in range(1, largest + 1)
        if world_size % degree == 0 and all(_fits(degree, *each[:2]) for each in heads)
    ]


def check_world(config: AlstConfig, world_size: int, heads: Iterable[tuple[int, int, str]] = ()) -> None:
    """Raise ConfigError, with the valid SP degrees, if this one does not divide the number of ranks.

    ``heads`` are the model's, if known: query heads, KV heads and their owner.
    """
    sp_size = config.sequence_parallel_size
    if world_size % sp_size:
        raise ConfigError(
            f"sequence_parallel_size={shown(sp_size)} does not divide the world size ({world_size} ranks). "
            f"Use one of {_fitting(world_size, [*heads])}."
        )


def check_heads(
    config: AlstConfig, num_heads: int, num_kv_heads: int, of: str = "attention", world_size: int = 0
) -> None:
    """Raise ConfigError, with the valid SP degrees, if this one cannot split these heads, of attention or a scan.

    It must divide the query heads, and divide the KV heads or be divided by them.
    """
    sp_size = config.sequence_parallel_size
    if _fits(sp_size, num_heads, num_kv_heads):
        return
    heads, shared = ("query heads", "key/value heads") if of == "attention" else (f"heads of a {of}", "groups of them")
    if sp_size > num_heads:
        why = f"is more than the model's {num_heads} {heads}"
    elif num_heads % sp_size:
        why = f"does not divide the model's {num_heads} {heads}"
    else:
        why = f"and the model's {num_kv_heads} {shared} do not divide one another"
    raise ConfigError(
        f"sequence_parallel_size={shown(sp_size)} {why}. "
        f"Use one of {_fitting(world_size, [(num_heads, num_kv_heads, of)])}; "
        f"the remaining ranks form data-parallel replicas by themselves."
    )


def check_batch_keys(ds_config: Mapping[str, Any], sp_size: int, world_size: int) -> None:
    """Raise ConfigError if the batch size keys are inconsistent or no numbers, with the value to change.

    Missing ones are derived like in DeepSpeed (_set_batch_related_parameters). Under sequence parallelism a micro-step
    is one rank's batch.
    """
    given = {name: ds_config[name] for name in (TOTAL, MICRO, GAS) if ds_config.get(name) is not None}
    wrong = [
        f'{name}: must be a positive whole number; "auto" is filled in by the HF Trainer alone (got {shown(value)}).'
        for name, value in given.items()
        if not is_count(value)
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
        f"sequence_parallel_size={sp_size} the {world_size} ranks are {replicas} replica(s), whose "
        f"ranks work on one rank's batch at a time, so that a batch of each rank is {sp_size} micro-steps, and {GAS} "
        f"counts micro-steps. Set {', or '.join(ways)}."
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

"""The three batch size keys of a ds_config under sequence parallelism, where a micro-step is one rank's batch. Pure."""

from collections.abc import Mapping
from typing import Any

from deepspeed_alst.errors import ConfigError
from deepspeed_alst.words import shown

TOTAL, MICRO, GAS = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"


def check_batch_keys(ds_config: Mapping[str, Any], sp_size: int, world_size: int) -> None:
    """Raise ConfigError if the batch size keys are inconsistent, with the value to change.

    Raises:
        ConfigError: none is given, one is not a positive integer, or their product differs.
    """
    given = {name: ds_config[name] for name in (TOTAL, MICRO, GAS) if ds_config.get(name) is not None}
    wrong = [
        f'{name}: must be a positive whole number; "auto" is filled in by the HF Trainer alone (got {shown(value)}).'
        for name, value in given.items()
        if type(value) not in (int, float) or value < 1 or value != value // 1
    ]
    if not wrong and not {TOTAL, MICRO} & given.keys():
        wrong = [f"{MICRO}: is not given, and no {TOTAL} either; set it to the samples of a rank's batch."]
    if wrong:
        raise ConfigError("\n".join(wrong))
    replicas = world_size // sp_size
    total, micro, accumulation = _filled_in(given, replicas)
    if total != micro * accumulation * replicas or not total:
        raise ConfigError(_explained(total, micro, accumulation, sp_size, world_size))


def _filled_in(given: Mapping[str, Any], replicas: int) -> tuple[int, int, int]:
    """Return all three numbers, missing ones derived like in DeepSpeed (_set_batch_related_parameters)."""
    total, micro, accumulation = (None if name not in given else int(given[name]) for name in (TOTAL, MICRO, GAS))
    if micro is None:
        assert total is not None
        accumulation = accumulation or 1
        return total, total // replicas // accumulation, accumulation
    if accumulation is None:
        accumulation = 1 if total is None else total // micro // replicas
    return micro * accumulation * replicas if total is None else total, micro, accumulation


def _explained(total: int, micro: int, accumulation: int, sp_size: int, world_size: int) -> str:
    replicas = world_size // sp_size
    product = micro * accumulation * replicas
    fits = micro and total % (micro * replicas) == 0 and total >= micro * replicas
    ways = [f"{GAS} to {total // (micro * replicas)}, which keeps the samples of a step"] if fits else []
    ways += [f"{TOTAL} to {product}"] if product else [f"{TOTAL} to a multiple of {replicas}"]
    return (
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

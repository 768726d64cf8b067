"""Batch keys of a ds_config that the HF Trainer fills in before an engine exists.

The Trainer's ``gradient_accumulation_steps`` counts batches of every rank; DeepSpeed's, under sequence parallelism,
counts micro-steps, P per batch. So "auto" becomes the Trainer's number times P, and the total batch size stays as at
SP 1. A number in the JSON means micro-steps, as in a plain loop; the Trainer's own may be the same, or P times smaller.
"""

import os
from collections.abc import Callable
from typing import Any

from deepspeed_alst.config.ds_values import GAS, MICRO, TOTAL, check_batch_keys
from deepspeed_alst.config.parse import parse
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import ConfigError

_PLANNED = "alst_micro_steps"


def fill_batch_keys(original: Callable[..., None], hf_config: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
    """Run ``HfTrainerDeepSpeedConfig.trainer_config_process`` with ``sequence_parallel_size`` > 1.

    Repeated calls with the same arguments, as by accelerate and the Trainer, are allowed.

    Raises:
        ConfigError: the number of micro-steps is not a multiple of P, or a key of this package is wrong.
    """
    P = parse(hf_config.config).sequence_parallel_size
    config = hf_config.config
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != ranks:
        raise ConfigError(
            f"HF Trainer: {ranks} ranks were started, but the Trainer sees {args.world_size}: on machines without an "
            "accelerator, accelerate takes every rank for itself. Add --use_cpu (TrainingArguments(use_cpu=True))."
        )
    given, micro = config.get(GAS, "auto"), config.get(MICRO, "auto")
    if type(given) is int and type(config.get(TOTAL)) is int:
        micro = args.per_device_train_batch_size if micro == "auto" else micro
        check_batch_keys({TOTAL: config[TOTAL], MICRO: micro, GAS: given}, P, ranks)
    if type(given) is int and given in (getattr(args, _PLANNED, None), args.gradient_accumulation_steps * P):
        config[GAS] = given // P
    elif type(given) is int and given == args.gradient_accumulation_steps:
        if given % P:
            raise ConfigError(
                f"{GAS}={given}: the HF Trainer draws a batch for every rank at a time, which are "
                f'sequence_parallel_size={P} micro-steps. Use a multiple of {P}, or "auto", which keeps the '
                "total batch size of the run without sequence parallelism."
            )
        args.gradient_accumulation_steps = config[GAS] = given // P
    original(hf_config, args, *rest, **kwargs)
    if config.get(GAS, args.gradient_accumulation_steps) == args.gradient_accumulation_steps:
        micro_steps = args.gradient_accumulation_steps * P
        config[GAS] = micro_steps
        PatchSet().set(args, _PLANNED, micro_steps)

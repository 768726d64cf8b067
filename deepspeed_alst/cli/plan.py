"""``ds_alst plan``: longest sequence that fits, bytes by category, limiting memory and step time, for any machine.

measure.py counts on fake tensors, memory.py and step_time.py compute, what_if.py changes keys.
"""

import argparse
import json
import sys
from typing import Any

from deepspeed_alst.attention.head_plan import attention_heads
from deepspeed_alst.cli.measure import Measuring, head_plan
from deepspeed_alst.cli.memory import GIB, Machine, Plan
from deepspeed_alst.cli.report import problems, read_json
from deepspeed_alst.cli.step_time import Rates, StepTime
from deepspeed_alst.cli.what_if import Variant, WhatIf, print_table, relative, row
from deepspeed_alst.config.compatibility import fitting, zero_stage
from deepspeed_alst.config.schema import parse
from deepspeed_alst.errors import ConfigError


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0 if the sequence fits, with ``--cheapest`` by some set of keys, else 1.

    Raises:
        AlstError: the ds_config or the model cannot be planned for, or options contradict one another.
    """
    check_options(arguments)
    machine = machine_of(arguments)
    measuring = Measuring(arguments.model, machine.node_size)
    if arguments.ds_config is None:
        ds_config = default_config(measuring.config, arguments.num_gpus)
        print(f"ds_alst plan: no --ds_config, so planned for {json.dumps(ds_config)}", file=sys.stderr)
    else:
        ds_config = read_json(arguments.ds_config)
    if lines := problems(ds_config, arguments.num_gpus):
        raise ConfigError("\n".join(lines))
    rates = Rates(arguments.flops, arguments.link, arguments.host_link, arguments.disk)
    what_if = WhatIf(measuring, ds_config, machine, rates)
    given = what_if.variant({}, arguments.seq_len)
    variants = list(what_if.one_at_a_time(arguments.seq_len)) if arguments.what_if else []
    found = what_if.cheapest(arguments.seq_len) if arguments.cheapest else None
    if found is not None and arguments.write is not None:
        arguments.write.write_text(json.dumps(found.ds_config, indent=2) + "\n", encoding="utf-8")
    fits = bool(given.longest) and not given.plan.over(machine)
    if arguments.json:
        print(json.dumps(_result(given, found, variants, fits, measuring), indent=1))
    else:
        _print(given, machine, arguments, measuring.config)
        if variants:
            print_table(variants, parse(ds_config).sequence_parallel_size)
        if arguments.cheapest:
            _print_cheapest(found, given, arguments)
    return int(found is None if arguments.cheapest else not fits)


def check_options(arguments: argparse.Namespace) -> None:
    """Raise ConfigError if options lack another, or a number is out of range."""
    if arguments.cheapest and arguments.seq_len is None:
        raise ConfigError("--cheapest: for which length? Give --seq_len N.")
    if arguments.write is not None and not arguments.cheapest:
        raise ConfigError(f"--write {arguments.write}: writes the ds_config that --cheapest finds; add --cheapest.")
    if not 0 <= arguments.margin < 1:
        raise ConfigError(f"--margin {arguments.margin}: must be a fraction of a GPU's memory, from 0 to below 1.")
    for name in ("flops", "link", "host_link", "disk"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise ConfigError(f"--{name} {value}: must be a rate above 0, such as 25e9.")


def machine_of(arguments: argparse.Namespace) -> Machine:
    """Return the machine of the command's options."""
    gpu_bytes = arguments.gpu_memory * (1 - arguments.margin) * GIB
    return Machine(arguments.num_gpus, gpu_bytes, arguments.host_memory * GIB, arguments.gpus_per_host)


def default_config(config: Any, num_gpus: int) -> dict[str, Any]:
    """Return a ds_config for a model: ZeRO 3, bf16, AdamW and the largest SP degree up to the GPUs and query heads."""
    heads = attention_heads(config)
    sp_size = max(degree for degree in fitting(num_gpus, []) if heads is None or degree <= heads[0])
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": sp_size,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "zero_optimization": {"stage": 3},
        "sequence_parallel_size": sp_size,
    }


def _result(
    given: Variant, found: Variant | None, variants: list[Variant], fits: bool, measuring: Measuring
) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    plan, config = given.plan, parse(given.ds_config)
    result = {
        "sequence": plan.tokens * config.sequence_parallel_size,
        "longest": given.longest,
        "bound by": given.limit,
        "fits": fits,
        "bytes of a GPU": plan.device,
        "bytes of a host": plan.host,
        "bytes of a host's disk": plan.disk,
        "attention's output": plan.attention,
        "largest share of heads": measuring.of(config)[0].imbalance,
        "kept a token and layer": measuring.of(config)[0].layers.input_bytes,
        "seconds of a step": None if given.time is None else {n: p._asdict() for n, p in given.time.parts.items()},
        "ds_config": given.ds_config,
    }
    if variants:
        result["what if"] = [row(each, given) for each in variants]
    if found is not None:
        result["cheapest"] = row(found, given) | {"ds_config": found.ds_config}
    return result


def _print(given: Variant, machine: Machine, arguments: argparse.Namespace, config: Any) -> None:
    split = head_plan(config, parse(given.ds_config), machine.node_size)
    plan, sp_size = given.plan, parse(given.ds_config).sequence_parallel_size
    stage = zero_stage(given.ds_config)
    print(f"{plan.tokens * sp_size:,} tokens, {plan.tokens:,} per rank at SP {sp_size}, ZeRO {stage}")
    if split is not None and split[0].summary:
        most = "" if split[0].imbalance == 1 else "; memory and time are those of a rank with the most"
        print(f"{split[0].summary}{most}")
    if split is not None and split[0].kv_summary:
        print(split[0].kv_summary)
    rows = {name: (plan.device.get(name), plan.host.get(name)) for name in {**plan.device, **plan.host}}
    rows["total"] = sum(plan.device.values()), sum(plan.host.values())
    rows["available"] = machine.gpu_bytes, machine.host_bytes
    print(f"{'':28}{'GiB per GPU':>14}{'GiB per host':>14}")
    for name, sizes in rows.items():
        print(f"{name:28}" + "".join(f"{'' if size is None else f'{size / GIB:,.1f}':>14}" for size in sizes))
    if plan.disk:
        print(f"{plan.disk / GIB:,.1f} GiB per host are on nvme_path.")
    print(f"{arguments.margin:.0%} of {arguments.gpu_memory:g} GiB per GPU are left free for fragmentation (--margin).")
    print(f"Attention's output is {plan.attention}.")
    if given.time is not None and plan.tokens:
        _print_time(given.time, plan, arguments.flops, sp_size)
    if plan.over(machine) or not given.longest:
        print(f"A sequence of {plan.tokens * sp_size:,} tokens does not fit.")
    print(f"The longest sequence that fits has {given.longest:,} tokens, limited by {given.limit} memory.")


def _print_time(time: StepTime, plan: Plan, flops: float, sp_size: int) -> None:
    print(f"Optimizer step of {time.micro_steps} micro-steps, computed from counts and rates, not measured")
    print(f"{'':28}{'seconds':>14}{'not hidden':>14}")
    for name, part in time.parts.items():
        print(f"{name:28}{part.seconds:14,.1f}{part.exposed:14,.1f}")
    per_gpu = time.micro_steps * plan.tokens / time.seconds
    print(f"{'step':28}{'':14}{time.seconds:14,.1f}")
    share = time.model_flops / time.seconds / flops
    print(f"{per_gpu * sp_size:,.0f} tokens/s per sequence; model FLOPs {share:.0%} of --flops {flops:.3g}")


def _print_cheapest(found: Variant | None, given: Variant, arguments: argparse.Namespace) -> None:
    if found is None:
        print(f"No set of keys makes {arguments.seq_len:,} tokens fit. Use more GPUs or hosts, or nvme_path.")
        return
    print(f"Cheapest keys for {arguments.seq_len:,} tokens: {found.name}")
    print(f"Step time {relative(found.time, given.time):.2f} of the given keys'; longest {found.longest:,} tokens.")
    if arguments.write is not None:
        print(f"Written to {arguments.write}.")

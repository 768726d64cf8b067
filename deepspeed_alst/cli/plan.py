"""``ds_alst plan``: longest sequence that fits, memory by category and the binding limit, for any machine.

One layer of the model runs with the ds_config's tiles on tensors without data (profiler/fake.py) to count bytes per
token; the rest is arithmetic (memory.py). Covers decoders in half precision with checkpointed layers.
"""

import argparse
import copy
import json
from dataclasses import asdict
from typing import Any

from deepspeed_alst.errors import ConfigError

SUMMARY = "how long a sequence fits into a machine's memory, where the bytes go, and what binds"
EXAMPLES = """  ds_alst plan --model meta-llama/Llama-3.1-8B --ds_config ds.json --num_gpus 8 --gpu_memory 80
  ds_alst plan --model ./config.json --ds_config ds.json --seq_len 1048576 --json"""
_TOKENS = (32768, 65536)  # of the two measurements of a linear fit: more than any tile has
_GIB = 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ds_alst plan``."""
    parser.add_argument("--model", required=True, help="a config.json, a folder or a hub name")
    parser.add_argument("--ds_config", required=True, metavar="JSON", help="the ds_config to plan for")
    parser.add_argument("--num_gpus", type=int, default=8, help="all of them (8)")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB of one (80)")
    parser.add_argument("--host_memory", type=float, default=1800, help="GiB of one host (1800)")
    parser.add_argument("--gpus_per_host", type=int, default=8, help="of those of --num_gpus (8)")
    parser.add_argument("--seq_len", type=int, help="tokens of a sequence; default: as many as fit")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; return 0 if the sequence fits, 1 if it does not.

    Raises:
        AlstError: the ds_config or the model cannot be planned for.
    """
    from deepspeed_alst.cli.keys import read_json
    from deepspeed_alst.cli.memory import Machine, longest, plan_of
    from deepspeed_alst.config.compatibility import check_features
    from deepspeed_alst.config.parse import check_world, parse

    ds_config = read_json(arguments.ds_config)
    config = parse(ds_config)
    P = config.sequence_parallel_size
    if P > 1:
        check_features(ds_config)
    check_world(config, arguments.num_gpus)
    model, layer = measure(arguments.model, config)
    machine = Machine(
        arguments.num_gpus, arguments.gpu_memory * _GIB, arguments.host_memory * _GIB, arguments.gpus_per_host
    )
    most, binding = longest(model, layer, ds_config, machine)
    tokens = most.tokens if arguments.seq_len is None else -(-arguments.seq_len // P)
    plan = plan_of(model, layer, ds_config, machine, tokens)
    over = plan.over(machine) or ("" if most.tokens else binding)
    said = {
        "sequence": tokens * P,
        "longest": most.tokens * P,
        "bound by": binding,
        "fits": not over,
        "bytes of a GPU": plan.device,
        "bytes of a host": plan.host,
        "bytes of a host's disk": plan.disk,
        "bucket": asdict(plan.bucket),
        "bytes a token of a rank": layer.a_token,
        "kept a token and layer": layer.kept,
    }
    if arguments.json:
        print(json.dumps(said, indent=1))
    else:
        _print(said, machine, P)
    return int(bool(over))


def measure(name: str, config: Any) -> tuple[Any, Any]:
    """Return a model's sizes, and the bytes of one layer on one of P ranks with the ds_config's tiles."""
    from deepspeed_alst.cli.measured import bytes_of
    from deepspeed_alst.cli.memory import Layer, Model
    from deepspeed_alst.verification.hf_parity_trial import numel
    from deepspeed_alst.verification.hf_tiny_models import causal_lm, load_config

    whole = load_config(name, small=False).get_text_config()
    num_layers = getattr(whole, "num_hidden_layers", 0)
    if not num_layers:
        raise ConfigError(f"--model {name}: num_hidden_layers is not in its config")
    one, two_layers = (numel(causal_lm, _with_layers(whole, count)) for count in (1, 2))
    largest = max(two_layers - one, whole.vocab_size * whole.hidden_size)
    model = Model(numel(causal_lm, whole), num_layers, largest)
    a, b = _TOKENS
    few, many = (bytes_of(_with_layers(whole, 1), config, tokens) for tokens in _TOKENS)
    two = bytes_of(_with_layers(whole, 2), config, a)
    slope, loss_slope = (many.in_layers - few.in_layers) / (b - a), (many.outside - few.outside) / (b - a)
    return model, Layer(
        fixed=max(0.0, few.in_layers - slope * a),
        a_token=slope,
        loss_fixed=max(0.0, few.outside - loss_slope * a),
        loss_a_token=max(0.0, loss_slope),
        kept=(two.kept - few.kept) / a,
    )


def _with_layers(config: Any, count: int) -> Any:
    """Return a config with layers of the last layer's kind, which usually attends to the whole sequence."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:] * count
    return config


def _print(said: dict[str, Any], machine: Any, sp_size: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{said['sequence']:,} tokens, {said['sequence'] // sp_size:,} on each of {sp_size} ranks")
    for column in ("", "GiB of a GPU", "GiB of a host"):
        table.add_column(column, justify="left" if not column else "right")
    device, host = said["bytes of a GPU"], said["bytes of a host"]
    for name in dict.fromkeys((*device, *host)):
        table.add_row(name, *(f"{each[name] / _GIB:.1f}" if name in each else "" for each in (device, host)))
    table.add_section()
    table.add_row("all", *(f"{sum(each.values()) / _GIB:.1f}" for each in (device, host)))
    table.add_row("there is", f"{machine.gpu_bytes / _GIB:.1f}", f"{machine.host_bytes / _GIB:.1f}")
    console = Console()
    console.print(table)
    if disk := said["bytes of a host's disk"]:
        console.print(f"{disk / _GIB:,.1f} GiB of a host's layer inputs go to nvme_path.")
    bucket = said["bucket"]
    console.print(
        f"A gradient bucket holds {bucket['numel']:,} elements by {bucket['key']}; "
        f'alst.reduction.bucket_size "auto" would take {bucket["auto"]:,}.'
    )
    console.print(f"The longest that fits has {said['longest']:,} tokens; the {said['bound by']}'s memory binds.")
    console.print("" if said["fits"] else "This one does not fit.")

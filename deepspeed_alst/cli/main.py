"""``ds_alst``: the options of its commands; a command is ``run(arguments) -> exit status`` of a module.

Only the module of the command is imported: --help loads neither torch nor transformers.
"""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepspeed_alst.errors import AlstError

_ERROR_STATUS = 2  # same as argparse
_COMMANDS = {
    "report": (
        "check the environment and a ds_config: a row per check, with a remedy",
        """  ds_alst report
  ds_alst report --ds_config ds.json --num_gpus 8
  ds_alst report --nvme_path /mnt/nvme --json""",
    ),
    "verify": (
        "train with and without sequence parallelism on the same samples, and compare the runs",
        """  ds_alst verify --ds_config ds.json --model meta-llama/Llama-3.1-8B
  ds_alst verify --ds_config ds.json --model ./config.json --num_gpus 2
  ds_alst verify --ds_config ds.json -- train.py --deepspeed ds.json --max_steps 5""",
    ),
    "plan": (
        "compute the longest sequence that fits into GPU and host memory, the bytes by category and the step time",
        """  ds_alst plan --model meta-llama/Llama-3.1-8B --num_gpus 8 --what_if
  ds_alst plan --model ./config.json --ds_config ds.json --seq_len 1048576 --json
  ds_alst plan --model ./config.json --seq_len 4000000 --cheapest --write ds.json""",
    ),
    "recipes": (
        "list, show or copy the ready ds_configs",
        """  ds_alst recipes
  ds_alst recipes llama-8b
  ds_alst recipes llama-8b-h100x8 --copy ds.json""",
    ),
    "keys": ("print the reference of the keys in Markdown", "  ds_alst keys > configuration.md"),
    "schema": ("print the JSON Schema of the keys, for editors", "  ds_alst schema > alst.schema.json"),
}
"""Summary and examples of each command."""
_REFERENCE = ("keys", "schema", "recipes")  # commands in one module


def main(words: Sequence[str] | None = None) -> int:
    """Run the command in ``words``, or in ``sys.argv``; return its exit status, or 2 for an AlstError."""
    arguments = build_parser().parse_args(words)
    module = "reference" if arguments.command in _REFERENCE else arguments.command
    try:
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed's logger keeps the stdout of its import
            command = importlib.import_module(f"deepspeed_alst.cli.{module}")
        return int(command.run(arguments))
    except AlstError as error:
        print(f"ds_alst {arguments.command}: {error}", file=sys.stderr)
        return _ERROR_STATUS


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="ds_alst", description="Checks before a long run.")
    version = f"deepspeed_alst {sys.modules['deepspeed_alst'].__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    report, verify, plan, recipes, *_ = (
        commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, (summary, examples) in _COMMANDS.items()
    )
    add = report.add_argument
    add("--json", action="store_true", help="print the rows as JSON: name, value, verdict, remedy")
    add("--nvme_path", default="", metavar="FOLDER", help="measure the disk of this folder with 256 MiB")
    add("--ds_config", metavar="JSON", help="check the keys of this ds_config")
    add("--num_gpus", type=int, metavar="N", help="number of ranks for --ds_config")
    add = verify.add_argument
    add("--ds_config", required=True, metavar="JSON", help="the ds_config to verify")
    add("--model", help="a config.json, a folder or a hub name; a small copy is trained")
    add("--full", action="store_true", help="train the model itself, with its weights if it has any")
    add("--num_gpus", type=int, help="number of ranks; default: all GPUs, or 2 on CPU")
    add("--seq_len", type=int, default=203, help="tokens per sample (203)")
    add("--steps", type=int, default=5, help="optimizer steps (5)")
    add("--data", default="", help=".jsonl with input_ids, labels; default: random tokens")
    add("--attn_implementation", default="sdpa", help="attention implementation (sdpa)")
    add("--output", type=Path, default=Path("runs/verify"), help="folder for results (runs/verify)")
    add("program", nargs="*", help="-- train.py --deepspeed ds.json ...: your program, instead of --model")
    _add_plan_options(plan.add_argument)
    add = recipes.add_argument
    add("name", nargs="?", default="", help="recipe to show, or a part of the names to list")
    add("--copy", type=Path, metavar="PATH", help="write the recipe to this file, or into this folder")
    return parser


def _add_plan_options(add: Callable[..., Any]) -> None:
    add("--model", required=True, help="a config.json, a folder or a hub name")
    add("--ds_config", metavar="JSON", help="the ds_config to plan for; default: ZeRO 3, bf16, the largest SP")
    add("--num_gpus", type=int, default=8, help="number of GPUs on all hosts (8)")
    add("--gpu_memory", type=float, default=80, help="GiB per GPU (80)")
    add("--host_memory", type=float, default=1769, help="GiB per host (1769, which are 1.9 TB)")
    add("--gpus_per_host", type=int, default=8, help="GPUs per host (8)")
    add("--margin", type=float, default=0.05, help="fraction of GPU memory to leave free (0.05)")
    add("--seq_len", type=int, help="tokens per sequence; default: the longest that fits")
    add("--what_if", action="store_true", help="also a table with each memory key switched, one at a time")
    add("--cheapest", action="store_true", help="also the keys with which --seq_len tokens fit at the least step time")
    add("--write", type=Path, metavar="JSON", help="write the ds_config of --cheapest")
    add("--flops", type=float, default=989e12 / 2, help="FLOP/s that a GPU reaches (half of an H100's bf16 peak)")
    add("--link", type=float, help="bytes/s between GPUs (450e9 within a host, 50e9 between hosts)")
    add("--host_link", type=float, default=25e9, help="bytes/s between a GPU and its host (25e9)")
    add("--disk", type=float, default=5e9, help="bytes/s of a host's nvme_path (5e9)")
    add("--json", action="store_true", help="print JSON")

"""``ds_alst verify``: compare training under a ds_config with training without sequence parallelism.

Runs ALST's own check (arXiv 2506.13996, section 5.4): DP = n, SP = 1, accumulation 1 against SP = n, accumulation n,
with the same samples in a step.
"""

import argparse
import copy
import json
import shutil
import time
from pathlib import Path
from typing import Any

from deepspeed_alst.cli.launch import launch, num_gpus
from deepspeed_alst.cli.report import problems, read_json
from deepspeed_alst.config.config_file import DTYPE, TOP_KEYS, is_wanted
from deepspeed_alst.config.parse import GAS, MICRO, block_of
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown

SUMMARY = "train with sequence parallelism and without, on the same samples, and say how far apart the two are"
EXAMPLES = """  ds_alst verify --ds_config ds.json --model meta-llama/Llama-3.1-8B
  ds_alst verify --ds_config ds.json --model ./config.json --num_gpus 2
  ds_alst verify --ds_config ds.json -- train.py --deepspeed ds.json --max_steps 5"""
_BASELINE, _ROUNDING = "SP 1", "SP 1 in fp32"
# A default tile would hold a tiny model's whole sequence.
_SMALL_TILES = {"tiled_mlp_compute": 37, "tiled_logits_loss": 41}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ds_alst verify``."""
    parser.add_argument("--ds_config", required=True, metavar="JSON", help="the ds_config to verify")
    parser.add_argument("--model", help="a config.json, a folder or a hub name; a small model of its kind is trained")
    parser.add_argument("--full", action="store_true", help="train the model itself; with the folder's weights, if any")
    parser.add_argument(
        "--num_gpus",
        type=int,
        help="ranks, which all share a sequence if they are fewer than the file's; default: all GPUs, or 2 on CPU",
    )
    parser.add_argument("--seq_len", type=int, default=203, help="tokens of a sample (203)")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps (5)")
    parser.add_argument("--data", default="", help=".jsonl with input_ids, labels; default: random tokens")
    parser.add_argument("--attn_implementation", default="sdpa", help="the model's attention (sdpa)")
    parser.add_argument("--output", type=Path, default=Path("runs/verify"), help="folder of results (runs/verify)")
    parser.add_argument(
        "program", nargs="*", help="-- train.py --deepspeed ds.json ...: your program, instead of --model"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare the runs; return 0 if they differ by rounding only, else 1.

    Raises:
        AlstError: the comparison cannot be made.
    """
    start = time.monotonic()
    if bool(arguments.model) == bool(arguments.program):
        raise ConfigError("verify: give either --model CONFIG, or your program: -- train.py --deepspeed ds.json ...")
    world_size = arguments.num_gpus or num_gpus() or 2
    sp_size, runs = configs_of(read_json(arguments.ds_config), world_size)
    output = arguments.output.absolute()
    for name in (*runs, _ROUNDING):  # of an earlier comparison; other files stay
        shutil.rmtree(output / name, ignore_errors=True)
    if arguments.program:
        programs = {name: with_file(arguments.program, str(output / name / "ds_config.json")) for name in runs}
    else:
        runs = {name: _plain(ds_config, output, small=not arguments.full) for name, ds_config in runs.items()}
        half = any((runs[_BASELINE].get(key) or {}).get("enabled") for key in ("bf16", "fp16"))
        if half and not arguments.full:
            half_keys = ("bf16", "fp16", "data_types")
            runs[_ROUNDING] = {key: value for key, value in runs[_BASELINE].items() if key not in half_keys}
    for name, ds_config in runs.items():
        (output / name).mkdir(parents=True)
        (output / name / "ds_config.json").write_text(json.dumps(ds_config, indent=1))
    if arguments.program:
        for name, program in programs.items():
            words = ["deepspeed_alst.cli.trial", str(output / name), str(arguments.steps), *program]
            launch(["--module", *words], world_size, output / f"{name}.log")
    else:
        spec = {key: value for key, value in vars(arguments).items() if key not in ("run", "output")}
        (output / "spec.json").write_text(json.dumps(spec | {"runs": list(runs)}))
        launch(["--module", "deepspeed_alst.cli.trial", str(output)], world_size, output / "run.log")

    from deepspeed_alst.cli.verdict import judge, show  # torch, rich

    rows = judge(output, *runs, sp_size=sp_size)
    lengths = f"{world_size} ranks; {arguments.steps} steps; {time.monotonic() - start:.0f} s"
    return show(rows, output, list(runs), lengths)


def configs_of(ds_config: dict[str, Any], world_size: int) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the SP degree to verify and the ds_config of each run by name, the baseline first.

    Args:
        ds_config: the user's.
        world_size: number of ranks; if fewer than the SP degree, all of them share a sequence.

    Raises:
        ConfigError: the file is invalid, accumulation is no multiple of the SP degree, or there is nothing to verify.
    """
    lines = problems(ds_config, None)
    for key in (MICRO, GAS):
        value = ds_config.get(key, "auto")
        if value != "auto" and (type(value) is not int or value < 1):
            lines.append(f"{key}: must be a positive whole number (got {shown(value)}).")
    if lines:
        raise ConfigError("\n".join(lines))
    wanted = ds_config.get("sequence_parallel_size", 1)
    if not is_wanted(ds_config):
        raise ConfigError("sequence_parallel_size=1 and no alst block: there is nothing to verify")
    sp_size = min(wanted, world_size)
    if sp_size < min(wanted, 2):
        raise ConfigError(
            "one rank cannot share a sequence: verify needs two or more (--num_gpus 2; on a machine with one GPU, "
            "DS_ACCELERATOR=cpu verifies a small model)"
        )
    if world_size % sp_size:
        raise ConfigError(f"sequence_parallel_size={wanted} does not divide {world_size} ranks; choose --num_gpus")
    split, whole = copy.deepcopy(ds_config), copy.deepcopy(ds_config)
    if (accumulation := ds_config.get(GAS, wanted)) != "auto":
        if accumulation % wanted:
            raise ConfigError(
                f"{GAS}={accumulation} is no multiple of sequence_parallel_size={wanted}: "
                "without sequence parallelism no step sees the same samples. Make it one"
            )
        whole[GAS], split[GAS] = accumulation // wanted, accumulation // wanted * sp_size
        for each in (whole, split):
            each.pop("train_batch_size", None)
    split["sequence_parallel_size"], whole["sequence_parallel_size"] = sp_size, 1
    for key in ("alst", DTYPE, *TOP_KEYS):
        whole.pop(key, None)
    name = f"SP {sp_size}" if sp_size > 1 else "with alst"
    return sp_size, {_BASELINE: whole, name: split}


def with_file(program: list[str], path: str) -> list[str]:
    """Replace a program's ds_config: ``--deepspeed JSON`` or ``--deepspeed_config JSON``, also with ``=``.

    Raises:
        ConfigError: the program has no such option.
    """
    for place, word in enumerate(program):
        key, equals, _ = word.partition("=")
        if key not in ("--deepspeed", "--deepspeed_config"):
            continue
        if equals:
            return [*program[:place], f"{key}={path}", *program[place + 1 :]]
        # Without a value, --deepspeed is DeepSpeed's own switch beside --deepspeed_config JSON.
        following = program[place + 1 : place + 2]
        if following and not following[0].startswith("-"):
            return [*program[: place + 1], path, *program[place + 2 :]]
    raise ConfigError("verify: the program's own words must have --deepspeed JSON, for another file to go there")


def _plain(ds_config: dict[str, Any], output: Path, small: bool) -> dict[str, Any]:
    """Adapt a ds_config to the built-in program, which trains by SGD because Adam would hide a gradient's scale."""
    config = _without_auto(ds_config)
    for key in ("optimizer", "scheduler", "train_batch_size", "tensorboard", "wandb", "csv_monitor", "comet"):
        config.pop(key, None)
    config.setdefault(MICRO, 1)
    config.setdefault(GAS, config["sequence_parallel_size"])
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "steps_per_print": 10**9}
    if not small or not any(key in config for key in ("alst", *TOP_KEYS)):
        return config
    block = config["alst"] = block_of(config)
    for key in TOP_KEYS:
        config.pop(key, None)
    block.setdefault("pad_to_multiple_of", config["sequence_parallel_size"])
    for key, tokens in _SMALL_TILES.items():
        value = block.get(key, "auto" if key == "tiled_logits_loss" else False)
        if value in (True, "auto"):
            block[key] = {"tile_tokens": tokens}
    offload = block.get("activation_checkpoint_cpu_offload")
    if isinstance(offload, dict) and "nvme_path" in offload:
        offload["nvme_path"] = str(output)
    return config


def _without_auto(value: Any) -> Any:
    """Drop the "auto" values that the HF Trainer would fill in."""
    if not isinstance(value, dict):
        return copy.deepcopy(value)
    return {key: _without_auto(each) for key, each in value.items() if each != "auto" or key == "tiled_logits_loss"}

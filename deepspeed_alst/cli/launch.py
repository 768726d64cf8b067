"""Runs of ``ds_alst verify``: their ds_configs, DeepSpeed's launcher, and the cause of a failure."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from deepspeed_alst.cli.report import problems
from deepspeed_alst.config.compatibility import GAS, MICRO
from deepspeed_alst.config.config_file import DTYPE, TOP_KEYS, config_on_command_line, is_wanted
from deepspeed_alst.config.schema import block_of
from deepspeed_alst.errors import ConfigError, SetupError
from deepspeed_alst.formatting import shown

PROGRESS = "ds_alst verify:"
"""Marker of log lines that are also shown on the terminal."""
BASELINE = "SP 1"
HALF_KEYS = ("bf16", "fp16")
# A default tile would hold a tiny model's whole sequence.
_SMALL_TILES = {"tiled_mlp_compute": 37, "tiled_logits_loss": 41}


def configs_of(ds_config: dict[str, Any], world_size: int) -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the SP degree to verify and the ds_config of each run by name, the baseline first.

    With fewer ranks than the file's SP degree, all ranks share a sequence.

    Raises:
        ConfigError: the file is invalid, accumulation is not a multiple of the SP degree, or nothing is to be verified.
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
        raise ConfigError("the ds_config has neither sequence_parallel_size > 1 nor an alst block: nothing to verify")
    sp_size = min(wanted, world_size)
    if sp_size < min(wanted, 2):
        raise ConfigError(
            "--num_gpus 1: verify needs two or more ranks (on a machine with one GPU, DS_ACCELERATOR=cpu ... "
            "--num_gpus 2 verifies a small model)"
        )
    if world_size % sp_size:
        raise ConfigError(f"sequence_parallel_size={wanted} does not divide {world_size} ranks; choose --num_gpus")
    split = dict(ds_config)
    whole = {key: value for key, value in ds_config.items() if key not in ("alst", DTYPE, *TOP_KEYS)}
    if (accumulation := ds_config.get(GAS, wanted)) != "auto":
        if accumulation % wanted:
            raise ConfigError(
                f"{GAS}={accumulation} is not a multiple of sequence_parallel_size={wanted}, so that no run without "
                "sequence parallelism has the same samples per step. Use a multiple."
            )
        whole[GAS], split[GAS] = accumulation // wanted, accumulation // wanted * sp_size
        for each in (whole, split):
            each.pop("train_batch_size", None)
    split["sequence_parallel_size"], whole["sequence_parallel_size"] = sp_size, 1
    return sp_size, {BASELINE: whole, f"SP {sp_size}" if sp_size > 1 else "with alst": split}


def builtin_config(ds_config: dict[str, Any], output: Path, small: bool) -> dict[str, Any]:
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
        return value
    return {key: _without_auto(each) for key, each in value.items() if each != "auto" or key == "tiled_logits_loss"}


def half_of(ds_config: dict[str, Any]) -> str:
    """Return the half precision in which a ds_config trains, bf16 or fp16; empty if none."""
    blocks = {key: ds_config.get(key) for key in HALF_KEYS}
    return next((key for key, block in blocks.items() if isinstance(block, dict) and block.get("enabled")), "")


def with_file(program: list[str], path: str) -> list[str]:
    """Replace the ds_config after ``--deepspeed`` or ``--deepspeed_config``; raise ConfigError without one."""
    given = config_on_command_line(program)
    if given is None:
        raise ConfigError("verify: the program's arguments must have --deepspeed JSON, which verify replaces")
    forms = (given, f"--deepspeed={given}", f"--deepspeed_config={given}")
    return [word.removesuffix(given) + path if word in forms else word for word in program]


def launch(words: list[str], world_size: int, log: Path) -> None:
    """Run a command with DeepSpeed's launcher and write a log; SetupError has the cause of a failure."""
    environment = dict(os.environ)
    if not num_gpus():
        environment["DS_ACCELERATOR"] = "cpu"
        # Threads of several ranks would compete for cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // world_size)))
    print(f"{PROGRESS} starting {world_size} ranks; all that they print goes to {log}", file=sys.stderr, flush=True)
    port = free_port()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world_size)]
    command, piped = [*launcher, "--master_port", str(port), *words], subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=piped, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
    )
    try:
        with log.open("w") as file:
            for line in process.stdout or ():
                file.write(line)
                if PROGRESS in line:
                    print(line[line.index(PROGRESS) :].rstrip(), file=sys.stderr, flush=True)
        status = process.wait()
    except BaseException:
        process.kill()
        raise
    finally:
        remove_shared_memory(port)
    if status:
        raise SetupError(f"{_reason(log)} (exit status {status}; full output: {log})")


def _reason(log: Path) -> str:
    """Return the last exception in a run's log."""
    lines = [line.split("]: ", 1)[-1].rstrip() for line in log.read_text(errors="replace").splitlines()]
    own = [line for line in lines if line.startswith("deepspeed_alst.errors.")]
    found = own or [line for line in lines if "Error" in line.split(":")[0] and ": " in line]
    return found[-1] if found else "the run failed"


def num_gpus() -> int:
    """Return the number of GPUs, or 0 if a run would use the CPU."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def free_port() -> int:
    """Return an unused port below the ephemeral range, of which gloo's sockets may take it before rank 0 listens."""
    for port in random.sample(range(15000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SetupError("none of 100 ports between 15000 and 32000 is free")


def remove_shared_memory(port: int) -> None:
    """Remove buffers of DeepSpeed's CPU communication: 66 MiB per rank in /dev/shm for each port used."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)

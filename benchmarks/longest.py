"""Table of the longest sequences of the recipes' models on 1 to 64 GPUs, by GPU memory and by host memory.

    python -m benchmarks.longest [MODEL ...]

Computed by ``ds_alst plan`` with its default machine, of the recipes' ds_configs with ``save_attention_output: false``,
without and with ``memory_lean_layer``; not run. Beside it the lengths that ALST's authors ran.
"""

import argparse
import copy
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

from benchmarks.figures import markdown
from benchmarks.recipes import load
from benchmarks.tiles.shapes import REAL_SIZE
from deepspeed_alst.cli.main import build_parser
from deepspeed_alst.cli.memory import Machine, longest
from deepspeed_alst.cli.plan import machine_of
from deepspeed_alst.config.schema import parse

GPUS = 1, 8, 16, 32, 64
MODELS = {"llama-8b": "Llama-3.1-8B", "llama-70b": "Llama-3.1-70B", "qwen3-32b": "Qwen3-32B"}
# Millions of tokens: Llama 8B on 1, 8 and 32 GPUs in the paper (arXiv 2506.13996, abstract); the others are max_length
# in its authors' recipes: github.com/snowflakedb/ArcticTraining, projects/sequence-parallelism, commit b28638e.
ALST = {
    "llama-8b": {1: 0.5, 8: 3.7, 16: 8.0, 32: 15.0},
    "llama-70b": {8: 0.2, 16: 1.2, 32: 4.0, 64: 10.0},
    "qwen3-32b": {1: 0.23, 8: 1.55, 16: 4.0, 32: 7.0, 64: 15.0},
}
_HEAD = ("model", "GPUs", "SP", "GPU memory", "GPU memory, memory-lean", "host memory", "disk, TB a host", "ALST")


class Longest(NamedTuple):
    """Tokens of the longest sequence, if one memory is the limit."""

    gpu: int
    host: int
    disk_bytes: float
    """Bytes on a host's disk at the length that the GPU allows."""


def ds_config_of(model: str, num_gpus: int) -> dict[str, Any]:
    """Return the recipe's ds_config; on one GPU, where the 70B has none, that of 8 with the weights on the host."""
    if (model, num_gpus) != ("llama-70b", 1):
        return copy.deepcopy(load(f"{model}-h100x{num_gpus}").ds_config)
    ds_config = ds_config_of(model, 8)
    ds_config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    return ds_config | {"sequence_parallel_size": 1, "gradient_accumulation_steps": 1}


def longest_of(model: str, num_gpus: int, lean: bool) -> Longest:
    """Return the longest sequences of a model on a number of GPUs."""
    machine = machine_of(build_parser().parse_args(["plan", "--model", "", "--num_gpus", str(num_gpus)]))
    ds_config = ds_config_of(model, num_gpus)
    ds_config["alst"] |= {"save_attention_output": False, "memory_lean_layer": lean}
    (shape,) = (each for each in REAL_SIZE if each.name == MODELS[model])
    measured = shape.measured(ds_config)

    def tokens(machine: Machine, nvme_path: str | None) -> tuple[int, float]:
        ds_config["alst"]["activation_checkpoint_cpu_offload"] = {"nvme_path": nvme_path} if nvme_path else True
        plan, _ = longest(*measured, ds_config, machine)
        return plan.tokens * parse(ds_config).sequence_parallel_size, plan.disk

    gpu, disk_bytes = tokens(machine, "/nvme")  # so that the host is no limit
    host, _ = tokens(replace(machine, gpu_bytes=2.0**60), None)
    return Longest(gpu, host, disk_bytes)


def _cells(case: tuple[str, int]) -> list[str]:
    model, num_gpus = case
    ordinary, lean = (longest_of(model, num_gpus, lean) for lean in (False, True))
    sp_size = ds_config_of(model, num_gpus)["sequence_parallel_size"]
    ran = ALST[model].get(num_gpus)
    lengths = [f"{each / 1e6:.2f}M" for each in (ordinary.gpu, lean.gpu, lean.host)]
    disk = f"{lean.disk_bytes / 1e12:.1f}" if lean.disk_bytes else "-"
    return [MODELS[model], str(num_gpus), str(sp_size), *lengths, disk, f"{ran:g}M" if ran else "-"]


def rows(models: Sequence[str]) -> Iterator[list[str]]:
    """Yield a row for each model and number of GPUs."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_cells, [(model, count) for model in models for count in GPUS])


def table() -> str:
    """Return the table of all models in Markdown."""
    return markdown(_HEAD, list(rows(tuple(MODELS))))


def main() -> int:
    """Print the rows of some models, or of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], default=[])
    print(f"| {' | '.join(_HEAD)} |", flush=True)
    for cells in rows(parser.parse_args().models or list(MODELS)):
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Overhead of the metrics: step times with and without them, alternating on 2 gloo ranks.

    python -m benchmarks.metrics

The worst case, a line and CSV events in every step, and a line every ten steps. Steps of the three engines alternate,
so that load on the machine affects all; a ratio is the median over rounds. Exit status 1 above 1.05.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.figures import Figure, Part, report
from benchmarks.ranks import Ranks

LENGTH, STEPS = 2048, 40
TARGET = 1.05
CASES: dict[str, dict[str, Any]] = {
    "without": {},
    "a line and CSV events every step": {"steps_per_print": 1, "csv_monitor": {"enabled": True}},
    "a line every 10 steps": {"steps_per_print": 10},
}


def seconds_a_step(folder: str) -> dict[str, list[float]]:
    """Return this rank's step times by case, without the first steps, which build ops and fill caches."""
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    import deepspeed_alst

    make = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, 256, (1, LENGTH), generator=make)
    engines = {}
    for index, (name, keys) in enumerate(CASES.items()):
        torch.manual_seed(0)
        sizes = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 2},
            "sequence_parallel_size": 2,
            **keys,
        }
        if "csv_monitor" in keys:
            config["csv_monitor"] = {**keys["csv_monitor"], "output_path": folder, "job_name": str(index)}
        engines[name] = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for step in range(STEPS + 2):
        for name, engine in engines.items():
            loader = deepspeed_alst.shard_dataloader([{"input_ids": ids, "labels": ids}], engine)
            dist.barrier()
            begin = time.perf_counter()
            for batch in loader:
                engine.backward(engine(**batch).loss)
                engine.step()
            if step > 1:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def rows() -> Iterator[Figure]:
    """Yield the median ratio of each case to the step without metrics."""
    with tempfile.TemporaryDirectory() as folder, Ranks(2) as ranks:
        seconds = ranks.run(seconds_a_step, folder)[0]
    plain = seconds.pop("without")
    yield Figure("without: seconds", (f"{statistics.median(plain):.3f}",))
    for name, each in seconds.items():
        ratio = statistics.median(ours / theirs for ours, theirs in zip(each, plain, strict=True))
        yield Figure(name, (f"{ratio:.3f}",), f"<= {TARGET} of without", ratio <= TARGET)


if __name__ == "__main__":
    sys.exit(report(__doc__, {f"a step of {LENGTH} tokens, {STEPS} rounds": Part(rows)}))

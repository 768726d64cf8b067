"""What only a GPU can show, on one CUDA GPU or more, in 8 minutes: ``make gpu``.

    python -m benchmarks.gpu [--cpu] [--json PATH] [--minutes 8] [--gib 10] [part ...]

Parts: kernels (as exact as torch, times beside a copy's and Liger's), errors (memory-lean layers against fp64), peak
(theirs beside ``ds_alst plan``'s), offload (bytes, hidden time, stalls), longest (Llama-3.2-1B: time of a step at a
common length, longest sequence within --gib of device memory) and ranks (SP 2 beside SP 1, with two GPUs).

It has not been run on a GPU. ``--cpu`` rehearses the same code on CPU with small sizes: kernels in Triton's
interpreter, a ledger in place of the allocator, gloo in place of NCCL, no streams, no Liger, no targets of time.

Each part runs in a process of its own, so that an error on the device ends that part alone, as a missed row. Parts that
the time does not reach are missed too. Exit status 1 if a target is missed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

from benchmarks.figures import Figure, Part, show
from benchmarks.gpu import SYSTEMS
from benchmarks.gpu.jobs import Job, rows_of

PARTS = {
    "kernels": "benchmarks.gpu.kernels:rows",
    "errors": "benchmarks.gpu.layers:errors",
    "peak": "benchmarks.gpu.layers:peak",
    "offload": "benchmarks.gpu.layers:offload",
    "ranks": "benchmarks.gpu.ranks:rows",
    "longest": "benchmarks.gpu.longest:rows",
}


def jobs(names: list[str], device: str, gib: float) -> Iterator[Job]:
    """Yield the jobs of the parts, of which the longest sequences have one for each system."""
    for name in names:
        for args in [(system,) for system in SYSTEMS] if name == "longest" else [()]:
            yield Job(", ".join([name, *args]), PARTS[name], device, gib, args)


def main() -> int:
    """Print the table and write it as JSON; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="part")
    parser.add_argument("--cpu", action="store_true", help="small sizes on CPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here too")
    parser.add_argument("--minutes", type=float, default=8, help="time of all parts (8)")
    parser.add_argument("--gib", type=float, default=10, help="device memory for the longest sequence (10)")
    arguments = parser.parse_args()
    start, figures = time.monotonic(), list[Figure]()
    environment = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "DEEPSPEED_LOG_LEVEL": "error"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # as the package's own default
    if arguments.cpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    os.environ |= environment

    def rows() -> Iterator[Figure]:
        for job in jobs(arguments.parts or list(PARTS), "cpu" if arguments.cpu else "cuda", arguments.gib):
            interprets = {"TRITON_INTERPRET": "1"} if arguments.cpu and job.name == "kernels" else {}
            with mock.patch.dict(os.environ, interprets):
                for figure in rows_of(job, start + 60 * arguments.minutes):
                    figures.append(figure)
                    yield figure

    count = show("GPU", Part(rows, caption="Small sizes on CPU, no GPU." if arguments.cpu else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n", encoding="utf-8")
    print(f"{count} targets missed; {time.monotonic() - start:.0f} s", flush=True)
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())

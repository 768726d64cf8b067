"""Compare the demo's loss curve with and without sequence parallelism; ``make bench-curve`` prints both.

Both runs use the command of ``make demo`` on 2 ranks: SP 2 with gradient accumulation 2, and SP 1 with accumulation 1.
Exit status 1 if the losses differ by more than 1e-4, or the last is not below 3.5 nats per byte.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, Part, report

ROOT = Path(__file__).parents[1]
LARGEST_DIFFERENCE, LAST_LOSS, LONGEST_SECONDS = 1e-4, 3.5, 180.0


@functools.cache
def run(name: str) -> tuple[list[dict], float]:
    """Run the example; return its log lines and its seconds with startup."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = ["deepspeed", "--num_gpus", "2", "examples/train.py", "--deepspeed", f"ds_configs/{name}.json"]
        start = time.monotonic()
        subprocess.run([*command, "--log-file", str(log)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in log.read_text().splitlines()], time.monotonic() - start


def steps() -> Iterator[Figure]:
    """Yield loss and gradient norm of each step."""
    for one, two in zip(run("sp1")[0], run("sp2")[0], strict=True):
        texts = (f"{each[key]:.6f}" for key in ("loss", "grad_norm") for each in (one, two))
        yield Figure(str(one["step"]), tuple(texts))


def targets() -> Iterator[Figure]:
    """Yield the figures that have a target."""
    (whole, whole_seconds), (split, seconds) = run("sp1"), run("sp2")
    apart = max(abs(one["loss"] - two["loss"]) for one, two in zip(whole, split, strict=True))
    last = split[-1]["loss"]
    yield Figure("largest difference", (f"{apart:.1e}",), f"<= {LARGEST_DIFFERENCE:.0e}", apart <= LARGEST_DIFFERENCE)
    yield Figure("last loss, nats a byte", (f"{last:.3f}",), f"< {LAST_LOSS}", last < LAST_LOSS)
    texts = (f"{seconds:.0f}, {whole_seconds:.0f} at SP 1",)
    yield Figure("seconds at SP 2", texts, f"< {LONGEST_SECONDS:.0f}", seconds < LONGEST_SECONDS)


PARTS = {
    "nats a byte": Part(steps, ("SP 1", "SP 2", "norm, SP 1", "norm, SP 2"), "2 ranks, 16,384 tokens"),
    "targets": Part(targets),
}

if __name__ == "__main__":
    sys.exit(report(__doc__, PARTS))

"""Compare the demo's loss curve with and without sequence parallelism; ``make bench-curve`` prints both.

Both runs use the command of ``make demo`` on 2 ranks: SP 2 with gradient accumulation 2, and SP 1 with accumulation 1.
Exit status 1 if the losses differ by more than 1e-4, or the last is not below 3.5 nats per byte.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
LARGEST_DIFFERENCE = 1e-4
LAST_LOSS = 3.5
LONGEST_SECONDS = 180.0


def run(name: str, folder: Path) -> tuple[list[dict], float]:
    """Run the example; return its log lines and its seconds with startup."""
    log = folder / f"{name}.jsonl"
    command = ["deepspeed", "--num_gpus", "2", "examples/train.py", "--deepspeed", f"ds_configs/{name}.json"]
    start = time.monotonic()
    subprocess.run([*command, "--log-file", str(log)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in log.read_text().splitlines()], time.monotonic() - start


def main() -> int:
    """Print both curves; return 1 if a target is missed."""
    with tempfile.TemporaryDirectory() as folder:
        split, seconds = run("sp2", Path(folder))
        whole, whole_seconds = run("sp1", Path(folder))
    table = Table(title="nats a byte; 2 ranks, 16,384 tokens")
    for column in ("step", "SP 1", "SP 2", "difference", "norm, SP 1", "norm, SP 2"):
        table.add_column(column, justify="right")
    differences = []
    for one, two in zip(whole, split, strict=True):
        differences.append(abs(one["loss"] - two["loss"]))
        table.add_row(
            str(one["step"]),
            f"{one['loss']:.6f}",
            f"{two['loss']:.6f}",
            f"{differences[-1]:.1e}",
            f"{one['grad_norm']:.6f}",
            f"{two['grad_norm']:.6f}",
        )
    console = Console(width=100)
    console.print(table)
    figures = {
        f"largest difference {max(differences):.1e} (target: <= {LARGEST_DIFFERENCE:.0e})": max(differences)
        <= LARGEST_DIFFERENCE,
        f"last loss {split[-1]['loss']:.3f} nats a byte (target: < {LAST_LOSS})": split[-1]["loss"] < LAST_LOSS,
        f"SP 2 took {seconds:.0f} s (target: < {LONGEST_SECONDS:.0f}; SP 1 took {whole_seconds:.0f})": seconds
        < LONGEST_SECONDS,
    }
    for figure, met in figures.items():
        console.print(f"{'ok    ' if met else 'MISSED'} {figure}")
    return 0 if all(figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

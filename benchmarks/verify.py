"""``ds_alst verify`` on tiny models from public configs: ``make verify`` prints each with its seconds.

The configs are those published by the models' authors. Exit status 1 if one differs, or takes longer than a minute.
"""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deepspeed_alst.cli.main import main as ds_alst

ROOT = Path(__file__).parents[1]
MODELS = sorted((ROOT / "benchmarks" / "models").glob("*.json"))
# Recipe for eight GPUs: ZeRO 3, bf16, tiles, layer inputs and optimizer on the host.
RECIPE = ROOT / "ds_configs" / "sp8_zero3_bf16_offload.json"
SECONDS = 60.0


def main() -> int:
    """Print the table; return 1 if a model misses."""
    table = Table("model", "seconds", f"target: {SECONDS:.0f}", "verdict")
    missed = 0
    for path in MODELS:
        start = time.monotonic()
        words = ["--model", str(path), "--ds_config", str(RECIPE), "--output", f"runs/verify/{path.stem}"]
        status = ds_alst(["verify", *words])
        seconds = time.monotonic() - start
        met = status == 0 and seconds <= SECONDS
        missed += not met
        table.add_row(path.stem, f"{seconds:.0f}", "ok" if seconds <= SECONDS else "missed", f"exit status {status}")
    Console().print(table)
    print(f"{missed} of {len(MODELS)} missed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

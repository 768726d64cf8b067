"""``ds_alst verify`` on tiny models from public configs: ``make verify`` prints each with its seconds.

The configs are those published by the models' authors. Exit status 1 if one differs, or takes longer than a minute.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure, Part, report
from deepspeed_alst.cli.main import main as ds_alst

ROOT = Path(__file__).parents[1]
# Recipe for eight GPUs: ZeRO 3, bf16, tiles, layer inputs and optimizer on the host.
RECIPE = ROOT / "ds_configs" / "sp8_zero3_bf16_offload.json"
SECONDS = 60.0


def rows() -> Iterator[Figure]:
    """Yield the exit status and seconds of each model."""
    for path in sorted((ROOT / "benchmarks" / "models").glob("*.json")):
        start = time.monotonic()
        words = ["--model", str(path), "--ds_config", str(RECIPE), "--output", f"runs/verify/{path.stem}"]
        status = ds_alst(["verify", *words])
        seconds = time.monotonic() - start
        met = status == 0 and seconds <= SECONDS
        yield Figure(path.stem, (str(status), f"{seconds:.0f}"), f"0, <= {SECONDS:.0f}", met)


if __name__ == "__main__":
    sys.exit(report(__doc__, {"ds_alst verify": Part(rows, ("exit status", "seconds"))}))

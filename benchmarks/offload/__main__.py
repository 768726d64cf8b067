"""Activation offload: bytes on device, host and disk, attention forwards, and step times.

    python -m benchmarks.offload [part ...]

Parts are waiting, tiers and attention; default: all. The exit status is non-zero if a target is missed.
"""

import sys
import time

from rich.console import Console
from rich.table import Table

from benchmarks.offload import attention, tiers, waiting
from benchmarks.parts import chosen_parts

PARTS = {"waiting": waiting, "tiers": tiers, "attention": attention}


def main() -> int:
    """Print a table for each part; return 1 if a target is missed."""
    started, missed, console = time.monotonic(), 0, Console(width=140)
    for name in chosen_parts(__doc__, PARTS):
        caption = " ".join((PARTS[name].__doc__ or "").split("\n\n", 1)[-1].split())
        table = Table("", "figure", "target", "verdict", title=name, caption=caption, caption_justify="left")
        for what, figure, target, met in PARTS[name].rows():
            missed += not met
            table.add_row(what, figure, target, ("ok" if met else "MISSED") if target else "")
        console.print(table)
    console.print(f"{missed} targets missed; {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Run all benchmarks in sequence and write their rows to docs/benchmarks.md: ``make bench``.

    python -m benchmarks.all [NAME ...]     # only some; the other sections are unchanged

A section holds the command, date, exit status, seconds, versions, and the tables' brief rows (benchmarks/figures.py);
the command itself prints all rows. Exit status 1 if a benchmark missed a target.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figures import SUMMARY

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
NAMES = ("kernels", "tiles", "memory", "reduction", "offload", "wire", "verify", "recipes", "curve")
NAMES += ("parity", "census")
_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "triton", "liger-kernel", "peft", "trl")
_HEAD = """# All benchmarks

Made by `make bench`, or section by section by `python -m benchmarks.all NAME`. The commands print all rows; here are
those that matter. What the figures are compared with is in [reproduce.md](reproduce.md). Everything here ran on a CPU;
times are noisy, ratios were measured side by side.
"""


def machine() -> str:
    """Describe versions and machine in one line."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}; {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, {memory:.0f} GiB"
    )


def section(name: str) -> tuple[str, int]:
    """Run a benchmark; return its section of the page and its exit status."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        summary = Path(folder) / "summary.md"
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", SUMMARY: str(summary)}
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], env=environment, check=False)
        rows = summary.read_text(encoding="utf-8") if summary.exists() else "No figures.\n"
    said = f"{datetime.date.today()}; exit status {done.returncode}; {time.monotonic() - start:.0f} s. {machine()}."
    return f"## {name}\n\n`python -m benchmarks.{name}`: {said}\n\n{rows}", done.returncode


def sections(page: str) -> dict[str, str]:
    """Split a page into its sections by name."""
    return {part.split("\n", 1)[0]: f"## {part}" for part in page.split("\n## ")[1:]}


def main() -> int:
    """Run the requested benchmarks and update the page after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], default=NAMES)
    missed = 0
    for name in parser.parse_args().names:
        kept = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
        kept[name], status = section(name)
        ordered = [kept[each].rstrip() + "\n" for each in NAMES if each in kept]
        PAGE.write_text("\n".join([_HEAD, *ordered]), encoding="utf-8")
        print(f"{name}: exit status {status}", flush=True)
        missed += status != 0
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Run all benchmarks in sequence and write their tables to docs/benchmarks.md: ``make bench``.

    python -m benchmarks.all [NAME ...]     # only some; the other tables are unchanged

Each section holds the command's output, exit status, seconds, versions and machine. Exit status 1 if a benchmark missed
a target.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
COMMANDS = {
    "kernels": ["-m", "benchmarks.kernels"],
    "tiles": ["-m", "benchmarks.tiles", "shapes", "loss", "gathers", "gradients", "time"],
    "reduction": ["-m", "benchmarks.reduction"],
    "offload": ["-m", "benchmarks.offload"],
    "wire": ["-m", "benchmarks.wire"],
    "verify": ["-m", "benchmarks.verify"],
    "recipes": ["-m", "benchmarks.recipes"],
    "faults": ["-m", "benchmarks.faults"],
    "metrics": ["-m", "benchmarks.metrics"],
    "curve": ["-m", "benchmarks.curve"],
    "two_hosts": ["-m", "benchmarks.two_hosts"],
    "parity": ["-m", "benchmarks.parity"],
    "census": ["-m", "benchmarks.census"],
}
_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "triton", "liger-kernel", "peft", "trl")
_HEAD = """# All benchmarks

Made by `make bench`, or table by table by `python -m benchmarks.all NAME`. Figures, targets and what they are compared
with are in [reproduce.md](reproduce.md). Everything here ran on a CPU; times are noisy, ratios were measured side by
side.
"""
_COLUMNS = "150"
_NOISE = re.compile(r"[Ww]arning|warnings\.warn|^\[transformers\]|^\[rank\d|^\d+/\d+ |^\[20\d\d-|^deepspeed_alst:")


def machine() -> str:
    """Describe versions and machine in one line."""
    versions = []
    for name in _PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"Python {platform.python_version()}, {', '.join(versions)}; {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores, {memory:.0f} GiB"
    )


def section(name: str) -> tuple[str, int]:
    """Run a benchmark; return its section of the page and its exit status."""
    start = time.monotonic()
    environment = {**os.environ, "COLUMNS": _COLUMNS, "PYTHONWARNINGS": "ignore", "TERM": "dumb"}
    command = [sys.executable, *COMMANDS[name]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.monotonic() - start
    lines = [line.rstrip() for line in done.stdout.splitlines() if not _NOISE.search(line)]
    said = f"{datetime.date.today()}; exit status {done.returncode}; {seconds:.0f} s. {machine()}."
    printed = "\n".join(line for line in lines if line) or (done.stderr.splitlines() or ["nothing"])[-1]
    return f"## {name}\n\n`python {' '.join(COMMANDS[name])}`: {said}\n\n```text\n{printed}\n```\n", done.returncode


def sections(page: str) -> dict[str, str]:
    """Split a page into its sections by name."""
    return {part.split("\n", 1)[0]: f"## {part}" for part in page.split("\n## ")[1:]}


def main() -> int:
    """Run the requested benchmarks and update the page after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*COMMANDS, []], default=list(COMMANDS))
    missed = []
    for name in parser.parse_args().names:
        kept = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
        kept[name], status = section(name)
        ordered = [kept[each].rstrip() + "\n" for each in COMMANDS if each in kept]
        PAGE.write_text("\n".join([_HEAD, *ordered]), encoding="utf-8")
        print(f"{name}: exit status {status}", flush=True)
        missed += [name] if status else []
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())

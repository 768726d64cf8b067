"""``ds_alst report``: the environment, with a verdict per part.

A separate process (probe.py) checks all that needs torch: if torch or DeepSpeed fails to load or crashes, that is a row
of the report instead of its end.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from deepspeed_alst.cli import host, keys, packages
from deepspeed_alst.cli.rows import Row, guarded, print_json, print_table

SUMMARY = "the environment that a run would have, with a verdict for each part of it and what to do"
EXAMPLES = """  ds_alst report
  ds_alst report --ds_config ds.json --num_gpus 8
  ds_alst report --nvme_path /mnt/nvme --json"""

# Like a user's program, it imports torch first: only torch's entry points may load this package.
_PROGRAM = """
import sys
import torch
package = sys.modules.get("deepspeed_alst")
loaded = package.__file__.removesuffix("/__init__.py") if package else ""
sys.path.append(sys.argv[1])
from deepspeed_alst.cli.probe import main
main(loaded, sys.argv[2])
"""
_PROBE_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``ds_alst report``."""
    parser.add_argument("--json", action="store_true", help="print the rows as JSON: name, value, verdict, remedy")
    parser.add_argument("--nvme_path", default="", metavar="FOLDER", help="measure this folder's disk, with 256 MiB")
    parser.add_argument("--ds_config", type=Path, metavar="JSON", help="also check the keys of this ds_config")
    parser.add_argument("--num_gpus", type=int, metavar="N", help="the ranks that --ds_config is checked for")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 if any row is a problem, else 0."""
    probe = _start_probe(arguments.nvme_path)
    rows = [*guarded("packages", packages.rows), *guarded("host", host.rows)]
    if arguments.ds_config is not None:
        rows += guarded("ds_config", lambda: keys.rows(arguments.ds_config, arguments.num_gpus))
    rows += _rows_of(probe)
    if arguments.json:
        print_json(rows)
    else:
        print_table(rows, "ds_alst report")
    return int(any(row.verdict == "problem" for row in rows))


def _start_probe(nvme_path: str) -> subprocess.Popen[str]:
    folder = Path(__file__).parent.parent.parent
    # -P keeps this folder and the current one out of sys.path, as for an installed program.
    command = [sys.executable, "-P", "-c", _PROGRAM, str(folder), nvme_path]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _rows_of(probe: subprocess.Popen[str]) -> Iterator[Row]:
    """Yield the probe's rows, plus one if it crashed or timed out."""
    try:
        out, errors = probe.communicate(timeout=_PROBE_SECONDS)
        end = f"ended with status {probe.returncode}" if probe.returncode else ""
    except subprocess.TimeoutExpired:
        probe.kill()
        out, errors = probe.communicate()
        end = f"gave no answer for {_PROBE_SECONDS:.0f} s"
    found = [Row(**json.loads(line)) for line in out.splitlines()]
    yield from found
    if end:
        last = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), "no message")
        where = f"after '{found[-1].name}'" if found else "at import torch"
        yield Row("a fresh process", f"{end} {where}: {last}", "problem", "see the whole of: python -c 'import torch'")

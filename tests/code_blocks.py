"""Pytest plugin that runs the bash and python blocks of Markdown pages: ``make examples``.

A block runs in a folder that looks like a clone, with ``ds.json`` and ``config.json``, which the pages' commands name;
blocks of a page share it. A block with a ``title`` after its language is not run: the title says why.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parent.parent
NOT_RUN_HERE = ("docs/migration.md",)
"""Programs and ds_configs, which tests/test_docs.py writes to files and launches on two ranks."""


def _enter(namespace: dict) -> None:
    folder = Path(tempfile.mkdtemp())
    for name in ("benchmarks", "ds_configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "ds_configs" / "cpu-sp2-all.json", folder / "ds.json")
    shutil.copy(ROOT / "benchmarks" / "models" / "llama-3.1-8b.json", folder / "config.json")
    namespace["_folder"], namespace["_before"] = folder, Path.cwd()
    os.chdir(folder)


def _leave(namespace: dict) -> None:
    os.chdir(namespace["_before"])
    shutil.rmtree(namespace["_folder"])


def _run_in_bash(example: Example) -> str | None:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", example.parsed], capture_output=True, text=True)
    return f"exit status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}" if done.returncode else None


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", _run_in_bash)],
    patterns=["**/*.md", "*.md"],
    excludes=NOT_RUN_HERE,
    path=str(ROOT),
    setup=_enter,
    teardown=_leave,
).pytest()

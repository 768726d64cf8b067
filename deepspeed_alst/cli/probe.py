"""Rows of ``ds_alst report`` that need torch and DeepSpeed, found in a process of its own.

Its parent (report.py) runs ``import torch`` before anything of this package; the first row reports what that loads.
Rows are printed one per line as they are found, so that a crash does not lose them.
"""

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from deepspeed_alst.cli.packages import autoload_switch
from deepspeed_alst.cli.rows import Row, guarded


def main(loaded: str, nvme_path: str) -> None:
    """Print all rows.

    Args:
        loaded: folder of this package if ``import torch`` loaded it, else empty.
        nvme_path: folder whose disk is measured; empty for none.
    """
    # Other packages write to stdout at import.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for row in _rows(loaded, nvme_path):
            print(json.dumps(dataclasses.asdict(row)), file=out, flush=True)


def _rows(loaded: str, nvme_path: str) -> Iterator[Row]:
    yield _hook_row(loaded)
    yield from guarded("import deepspeed", _deepspeed_rows)
    yield from guarded("a run's modules", _run_rows)
    yield from guarded("device", lambda: _of("device", "device_rows"))
    yield from guarded("attention", lambda: _of("device", "attention_rows"))
    for part, name in (("ops", "op_rows"), ("async_io", "aio_rows"), ("build locks", "lock_rows")):
        yield from guarded(part, lambda name=name: _of("compiled", name))
    yield from guarded("host memory", lambda: _of("compiled", "memory_rows"))
    if nvme_path:
        yield from guarded("disk", lambda: _of("compiled", "disk_rows", nvme_path))


def _of(module: str, function: str, *arguments: str) -> Iterable[Row]:
    """Return the rows of a module that may fail to import."""
    rows: Callable[..., Iterable[Row]] = getattr(importlib.import_module(f"deepspeed_alst.cli.{module}"), function)
    return rows(*arguments)


def _hook_row(loaded: str) -> Row:
    name, here = "import torch", str(Path(__file__).parent.parent)
    if not loaded:
        switch = autoload_switch()
        return Row(
            name,
            f"does not load deepspeed_alst in a fresh process{f' ({switch})' if switch else ''}",
            "problem",
            f"unset {switch.partition('=')[0]}" if switch else "install the package, and see what import torch prints",
        )
    if loaded != here:
        return Row(name, f"loads another copy: {loaded}, not {here}", "note", "uninstall one of the two")
    return Row(name, f"loads {loaded} in a fresh process")


def _deepspeed_rows() -> Iterator[Row]:
    import deepspeed

    from deepspeed_alst.engine.environment import check_deepspeed

    name = "import deepspeed"
    check_deepspeed()
    if hasattr(deepspeed.initialize, "__deepspeed_alst__"):
        yield Row(name, "deepspeed.initialize reads this package's keys")
    else:
        yield Row(
            name,
            "deepspeed.initialize does not read this package's keys",
            "problem",
            "look at the rows above; or import deepspeed_alst before deepspeed.initialize",
        )


def _run_rows() -> Iterator[Row]:
    """Import all that deepspeed.initialize loads for this package's keys, transformers included."""
    importlib.import_module("deepspeed_alst.initialize")
    transformers = sys.modules["transformers"]
    yield Row("a run's modules", f"load, with transformers at {Path(transformers.__file__ or '').parent}")

"""Inject faults into training runs and check the recovery: ``python -m benchmarks.faults [fault ...]``.

Two ranks share a sequence at ZeRO 2 and save after every second step; rank 1 fails in step 4 of 5, or in its save. A
row shows the seconds until the launcher and all ranks are gone, their error message, and whether a run resumed from
``latest`` ends on the loss curve of an uninterrupted one, bit-equal. Exit status 1 if a row fails a check.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.faults.program import SAVE_EVERY, STEPS
from benchmarks.faults.runs import MIB, Curve, End, curve_of, run, small_disk, train_here
from benchmarks.ranks import RankError, Ranks
from deepspeed_alst.checkpoint.load import verify
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import CheckpointError

TARGET_SECONDS = 60.0
# Ranks time out after this long in the stalled run; then they wait 10 s for each rank to answer, and DeepSpeed's
# launcher gives a stopped process 30 s before it kills it.
STALL_TIMEOUT = 20.0
STALL_TARGET = STALL_TIMEOUT + 10.0 + 30.0 + 15.0
_FILES = (
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
)


@dataclass(frozen=True)
class Fault:
    """Fault and its expected outcome."""

    words: str
    program: str
    """Name of the fault in program.py."""
    says: str
    """Pattern that finds the cause in the output. Its group, if any, is shown in the table."""
    terminate: bool = False
    target: float = TARGET_SECONDS
    timeout: float | None = None
    disk: str = ""
    """Content of the small disk: "checkpoints" or "layers"."""


FAULTS = {
    # The launcher polls once a second and ends the others; the launcher or the peer reports it first.
    "kill": Fault("rank 1 is killed in a step", "killed", r"rank 1 has ended|return code = -9"),
    "kill-save": Fault("rank 1 is killed in a save", "killed-in-save", r"rank 1 has ended|return code = -9"),
    "raise": Fault("rank 1 raises in a step", "raises", r"RuntimeError: rank 1 breaks in its own program"),
    "stall": Fault(
        "rank 1 is stopped in a step",
        "stalled",
        r"RankLostError: rank 1 does not answer within 10 s",
        target=STALL_TARGET,
        timeout=STALL_TIMEOUT,
    ),
    "disk-save": Fault(
        "full disk in a save", "disk", r"CheckpointError: .*(global_step4 could not be written)", disk="checkpoints"
    ),
    "disk-layers": Fault(
        "full disk for layer inputs",
        "disk",
        r"OffloadError: .*(there is room for .* on disk)\.",
        disk="layers",
    ),
    "term": Fault("SIGTERM in a step", "held", r"received SIGTERM|return code = -15", terminate=True),
    "term-save": Fault("SIGTERM in a save", "held-in-save", r"received SIGTERM|return code = -15", terminate=True),
    "nan": Fault("a loss is NaN", "nan", r"NonFiniteLossError: the loss is nan in optimizer step 4, micro-step 2"),
}


@dataclass
class Row:
    """Result of a run with one fault."""

    fault: Fault
    seconds: float | None = None
    said: str = ""
    lost: str = ""
    resume: str = ""
    problems: list[str] = field(default_factory=list)


def ds_config(nvme_path: Path | None) -> dict[str, Any]:
    """Return a ZeRO 2, SP 2 config, with layer inputs offloaded to a disk if given."""
    alst: dict[str, Any] = {}
    if nvme_path is not None:
        alst["activation_checkpoint_cpu_offload"] = {"nvme_path": str(nvme_path), "host_budget": 1, "keep_last": 0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "steps_per_print": 1000000,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "sequence_parallel_size": 2,
        "alst": alst,
    }


class Bench:
    """Working folder, ranks that stay up for fault-free runs, and the uninterrupted run."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder, self._ranks = folder, ranks
        self._plain = self._write("plain", None)
        self.whole = self._run_here("whole")

    def row(self, name: str) -> Row:
        """Run with one fault and check the outcome."""
        fault, row = FAULTS[name], Row(FAULTS[name])
        with PatchSet() as stack:
            checkpoints, config, arguments = (
                self._folder / name / "checkpoints",
                self._plain,
                ["--fault", fault.program],
            )
            if fault.disk == "checkpoints":
                # Room for one and a half checkpoints.
                disk = stack.enter_context(small_disk(self._checkpoint_bytes() * 3 // 2, "tmpfs"))
                if disk is None:
                    arguments = ["--fault", "short-file"]
                checkpoints = checkpoints if disk is None else disk / "checkpoints"
            elif fault.disk == "layers":
                disk = stack.enter_context(small_disk(16 * MIB, "ext4"))
                if disk is None:
                    row.problems.append("no disk of 16 MiB can be mounted here")
                    return row
                config = self._write(name, disk)
                arguments += ["--fill", str(disk)]
            if fault.timeout is not None:
                arguments += ["--timeout", str(fault.timeout)]
            arguments += ["--save", str(checkpoints)]
            end = run(self._folder / name / "run", config, arguments, fault.terminate, seconds=2 * fault.target)
            self._judge(row, end)
            self._resume(row, name, checkpoints)
        return row

    def _judge(self, row: Row, end: End) -> None:
        row.seconds = end.seconds
        # None for a run without a fault.
        if end.seconds is None or not end.seconds <= row.fault.target:
            row.problems.append(f"not stopped within {row.fault.target:.0f} s")
        found = re.search(row.fault.says, end.output)
        if found is None:
            row.problems.append(f"nobody names the cause; last: {end.output[-1500:]}")
        else:
            row.said = found.group(found.re.groups)
        if end.curve.weights:
            row.problems.append("it came to its end")
        _same(row, "before the fault", end.curve, self.whole, range(1, len(end.curve.steps) + 1))
        row.lost = ", ".join(str(step) for step in end.curve.steps if step > SAVE_EVERY)

    def _resume(self, row: Row, name: str, checkpoints: Path) -> None:
        latest = checkpoints / "latest"
        tag = latest.read_text() if latest.exists() else "nothing"
        if tag != f"global_step{SAVE_EVERY}":
            row.problems.append(f"latest names {tag}")
            return
        try:
            for each in _FILES:
                verify(checkpoints / tag / each)
            rest = self._run_here(f"{name}/resumed", str(checkpoints))
        except (CheckpointError, RankError) as error:
            row.problems.append(f"no resume: {str(error)[-500:]}")
            return
        _same(row, "resumed", rest, self.whole, range(SAVE_EVERY + 1, STEPS + 1))
        if rest.weights != self.whole.weights or len(rest.weights) != 1:
            row.problems.append("resumed, the weights are others")
        row.resume = f"from step {SAVE_EVERY}, bit-equal" if not row.problems else "see verdict"

    def _checkpoint_bytes(self) -> int:
        """Return the size of one checkpoint of the uninterrupted run."""
        one = self._folder / "size" / f"global_step{SAVE_EVERY}"
        return sum(path.stat().st_size for path in one.glob("*.pt"))

    def _run_here(self, name: str, load: str | None = None) -> Curve:
        folder = self._folder / name
        folder.mkdir(parents=True)
        # The first run saves too, to measure the checkpoint size.
        save = str(self._folder / "size") if load is None else None
        self._ranks.run(train_here, str(self._plain), str(folder), load, save)
        return curve_of(folder)

    def _write(self, name: str, nvme_path: Path | None) -> Path:
        path = self._folder / f"{name}.json"
        path.write_text(json.dumps(ds_config(nvme_path)))
        return path


def _same(row: Row, when: str, found: Curve, whole: Curve, steps: range) -> None:
    wrong = [step for step in steps if found.steps.get(step) != whole.steps[step]]
    if wrong or len(found.steps) != len(steps):
        row.problems.append(f"{when}, steps {wrong or sorted(found.steps)} are not those of the uninterrupted run")


def rows_of(names: Sequence[str]) -> Iterator[Row]:
    """Run each of these faults."""
    with tempfile.TemporaryDirectory(prefix="faults_") as folder, Ranks(2) as ranks:
        bench = Bench(Path(folder), ranks)
        for name in names:
            yield bench.row(name)


def table_of(rows: Sequence[Row]) -> Table:
    """Format the rows as a table."""
    table = Table(title=f"Two ranks share a sequence; saved after step {SAVE_EVERY}, broken in step 4 or in its save")
    for column in ("fault", "s to stop", "target", "what the output says", "steps done again", "resume", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        verdict = "; ".join(row.problems)[:200] or "ok"
        table.add_row(row.fault.words, seconds, f"{row.fault.target:.0f}", row.said, row.lost, row.resume, verdict)
    return table


def main() -> int:
    """Print the table; return 1 if a row misses its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "faults", nargs="*", metavar="fault", help=f"one or more of: {', '.join(FAULTS)} (default: all)"
    )
    names = parser.parse_args().faults or list(FAULTS)
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(FAULTS)}")
    start, console, rows = time.monotonic(), Console(width=150), []
    for row in rows_of(names):
        rows.append(row)
        console.print(f"{row.fault.words}: {'; '.join(row.problems) or 'ok'}", markup=False)
    console.print(table_of(rows))
    met = sum(not row.problems for row in rows)
    console.print(f"{met} of {len(rows)} rows within their target (target: all)\n{time.monotonic() - start:.0f} s")
    return 0 if met == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())

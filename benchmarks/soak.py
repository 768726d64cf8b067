"""Soak test: drift from SP 1 and leaks over 300 optimizer steps. ``python -m benchmarks.soak``.

A tiny Llama with activation checkpoints, AdamW and ZeRO 2 on 2 ranks, with new sequence lengths in every step. At SP 2
with tiled MLP and loss, offload alternating between disk and host, log lines and CSV events. Every 50 steps it is
evaluated, saved, and resumed by a new engine in the same process. It is compared with SP 1, and with SP 1 with the same
tiles, whose different rounding gives the tolerance for 300 steps.

Exit status 1 if a row misses its target.
"""

import gc
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.cells import Cell, build_model, ds_config, model_config
from benchmarks.ranks import Ranks

STEPS, CHAPTER = 300, 50
SAMPLES = 4  # per step, over all ranks
# The first two chapters fill the pools and caches of both tiers.
SETTLED = 2
SLACK, EPSILON = 10.0, torch.finfo(torch.float32).eps
LARGEST_GROWTH = 0.03  # of resident memory, in the 200 steps after the first 100

CELL = Cell(stage=2, gas=SAMPLES // 2, checkpointing="non-reentrant")
_VOCABULARY = 97
# SP degree of each run, and True if MLP and loss are tiled.
CASES = {"whole": (1, False), "tiled": (1, True), "split": (2, True)}


@dataclass
class Run:
    """Results of a run on one rank."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[float] = field(default_factory=list)
    held: list[dict[str, int]] = field(default_factory=list)
    """Resources held by the process after each chapter."""


def step_samples(step: int) -> list[dict[str, torch.Tensor]]:
    """Create learnable sequences, each counting by its own increment; 17 to 128 tokens."""
    make = torch.Generator().manual_seed(step)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=make))

    ids = [(draw(0, 97) + draw(1, 6) * torch.arange(draw(17, 129)))[None] % _VOCABULARY for _ in range(SAMPLES)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def build_engine(sp_size: int, tiled: bool, chapter: int, folder: str) -> Any:
    """Build a new engine, as a restarted program does."""
    import deepspeed

    config = ds_config(CELL, sp_size)
    if tiled:
        config["alst"] = {"tiled_mlp_compute": {"tile_tokens": 16}, "tiled_logits_loss": {"tile_tokens": 16}}
    if sp_size > 1:
        offload: dict[str, Any] = {"keep_last": 0} | ({} if chapter % 2 else {"nvme_path": folder, "host_budget": 1})
        config["alst"] |= {
            "pad_to_multiple_of": 16,
            "activation_checkpoint_cpu_offload": offload,
            "save_attention_output": True,
        }
        config |= {"steps_per_print": 10, "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "soak"}}
    model = build_model(model_config(CELL)).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(sp_size: int, tiled: bool, folder: str) -> Run:
    """Run all steps, on every rank."""
    import deepspeed_alst

    run = Run()
    for chapter, first in enumerate(range(0, STEPS, CHAPTER)):
        engine = build_engine(sp_size, tiled, chapter, folder)
        if chapter:
            path, state = engine.load_checkpoint(folder)
            assert path is not None and state["step"] == first, (path, state)
        for step in range(first, first + CHAPTER):
            own = step_samples(step)[dist.get_rank() :: 2]
            losses = []
            for batch in deepspeed_alst.shard_dataloader(own, engine):
                loss = engine(**batch).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.detach())
            run.losses.append(_mean(losses))
        run.evaluations.append(_evaluate(engine))
        engine.save_checkpoint(folder, tag=f"chapter{chapter}", client_state={"step": first + CHAPTER})
        engine.destroy()
        del engine, loss, losses, batch
        gc.collect()
        run.held.append(held())
    return run


def _evaluate(engine: Any) -> float:
    import deepspeed_alst

    engine.eval()
    with torch.no_grad():
        own = step_samples(STEPS)[dist.get_rank() :: 2]
        losses = [engine(**batch).loss for batch in deepspeed_alst.shard_dataloader(own, engine)]
    engine.train()
    return _mean(losses)


def _mean(losses: list[torch.Tensor]) -> float:
    mean = torch.stack(losses).double().mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def held() -> dict[str, int]:
    """Return the system resources that this process holds."""
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line]
    ends = [[int(end, 16) for end in each[0].split("-")] for each in maps]
    return {
        "resident memory, KiB": int(Path("/proc/self/statm").read_text().split()[1])
        * os.sysconf("SC_PAGE_SIZE")
        // 1024,
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "/dev/shm, bytes mapped": sum(end - begin for begin, end in ends),
    }


@dataclass(frozen=True)
class Row:
    """One figure with its target, an upper limit."""

    what: str
    before: str
    figure: float
    target: float

    @property
    def is_met(self) -> bool:
        """True if the figure is within its target; NaN is not."""
        return self.figure <= self.target


def difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference of two curves."""
    return max((abs(a - b) / abs(b) if math.isfinite(a) else math.inf) for a, b in zip(ours, theirs, strict=True))


def rows_of(split: list[Run], whole: Run, tiled: Run) -> list[Row]:
    """Return the rows: curves of rank 0, and resources of each rank of the split run."""
    rows = []
    for what in ("losses", "evaluations"):
        curve = getattr(whole, what)
        yardstick = difference(getattr(tiled, what), curve)
        ours = difference(getattr(split[0], what), curve)
        rows.append(
            Row(f"{what}, SP 2 beside SP 1", f"rounding alone {yardstick:.1e}", ours, SLACK * max(yardstick, EPSILON))
        )
    rows.append(
        Row("last loss of the first", f"first {whole.losses[0]:.3f}", split[0].losses[-1] / whole.losses[0], 0.5)
    )
    for rank, run in enumerate(split):
        for what in run.held[0]:
            settled = max(each[what] for each in run.held[:SETTLED])
            growth = run.held[-1][what] - settled
            target = LARGEST_GROWTH * settled if what.startswith("resident") else 0
            rows.append(Row(f"rank {rank}: {what}, growth", f"{settled:,} after {SETTLED * CHAPTER}", growth, target))
    return rows


def main() -> int:
    """Print the table; return 1 if a row misses its target."""
    start = time.monotonic()
    with Ranks(2) as ranks:
        runs = {}
        for name, (sp_size, tiled) in CASES.items():
            with tempfile.TemporaryDirectory(prefix="soak_") as folder:
                runs[name] = ranks.run(train, sp_size, tiled, folder, seconds=3600)
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
    rows = rows_of(runs["split"], runs["whole"][0], runs["tiled"][0])
    table = Table(title=f"{STEPS} steps at SP 2, saved and resumed every {CHAPTER}")
    for column in ("figure", "beside", "found", "target", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            row.what, row.before, f"{row.figure:.3g}", f"<= {row.target:.3g}", "ok" if row.is_met else "MISSED"
        )
    console = Console(width=120)
    console.print(table)
    met = sum(row.is_met for row in rows)
    console.print(f"{met} of {len(rows)} rows within their target (target: all)\n{time.monotonic() - start:.0f} s")
    return int(met < len(rows))


if __name__ == "__main__":
    sys.exit(main())

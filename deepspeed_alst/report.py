"""Activation report: what is on, off and why, printed by rank 0."""

import sys
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from deepspeed_alst.core.feature import Feature, RunContext

_SWITCHED = ("offload", "liger", "tiled MLP", "tiled loss")
_MODEL_CHECK = {
    True: "SP 1 against SP on short sequences, before the first forward; code that only long ones reach is not checked",
    False: "off: alst.check_model is false",
}


def print_report(rows: list[tuple[str, str]]) -> None:
    """Print rows as a table on rank 0."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    table = Table(title="deepspeed_alst", title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    # Above the Trainer's progress bar. A log file has no width, and rows must not be truncated.
    with tqdm.external_write_mode(file=sys.stderr):
        Console(stderr=True, width=120).print(table)


def report_rows(run: RunContext, engine: Any, features: list[Feature], allocator: str) -> list[tuple[str, str]]:
    """Return the rows of the activation report: name and description."""
    rows = [row for feature in features for row in feature.report()]
    off = [name for name in _SWITCHED if name not in dict(rows)]
    rows += [("off", ", ".join(off))] if off else []
    memory = [("CUDA allocator", allocator)] if allocator else []
    if run.session is None:
        reason = "sequence_parallel_size is 1"
        return [("sequence parallelism", f"off: {reason}"), *rows, ("reduction", f"DeepSpeed's: {reason}"), *memory]
    groups, multiple = run.session.groups, run.config.padding_multiple()
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    sharded = "" if engine.training_dataloader is None else "training_data is sharded; "
    check = _MODEL_CHECK[run.config.alst.check_model]
    if run.upstream is not None:
        sharded, check = "UlyssesSPDataLoaderAdapter is replaced; ", "off: the program is written for shards"
    shares = [plan.summary for plan in run.session.heads if plan.summary]
    shares += [plan.kv_summary for plan in run.session.heads if plan.kv_parts > 1]
    return [
        (
            "sequence parallelism",
            "; ".join([f"{groups.sp_size} ranks per sequence, {groups.dp_size} replica(s)", *shares]),
        ),
        (
            "data",
            f"{sharded}sequences are padded to a multiple of {multiple} tokens, {multiple // groups.sp_size} per rank",
        ),
        ("optimizer step", describe_step(micro, accumulation, groups.sp_size, groups.dp_size)),
        *rows,
        ("model check", check),
        *memory,
    ]


def describe_step(micro: int, accumulation: int, sp_size: int, replicas: int) -> str:
    """Describe an optimizer step in samples and micro-steps."""
    samples = micro * accumulation * replicas
    words = f"{samples} samples: {accumulation} micro-steps of {micro} sample(s) on {replicas} replica(s)"
    words += f"; at SP 1 they would be {samples * sp_size} samples"
    if accumulation % sp_size:
        words += (
            f"; gradient_accumulation_steps is not a multiple of sequence_parallel_size={sp_size}, so that some steps "
            "take only some of the batches that the ranks of a sequence have loaded together"
        )
    return words

"""Activation report: the enabled features, printed once on rank 0."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from deepspeed_alst.config.ds_values import step_words
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.engine.reduction import ReductionPath
from deepspeed_alst.parallel.reduction import Reduction
from deepspeed_alst.words import in_words

WHOLE_LOSS = "of the whole sequence on every rank"
SHARD_LOSS = (
    "of this rank's shard, which the program aggregates (DeepSpeed's mpu); TiledMLP, TiledFusedLogitsLoss: ours"
)
_CHECK = {
    True: "whole against split before the first forward; what only longer sequences reach is unchecked",
    False: "off: alst.check_model is false",
}


def print_report(rows: list[tuple[str, str]]) -> None:
    """Print rows of name and value as a table on rank 0."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    table = Table(title="deepspeed_alst", title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    # A log file has no width, and rows must not be truncated.
    Console(stderr=True, width=120).print(table)


def warn_rank_0(line: str) -> None:
    """Print a non-empty line on rank 0, with or without an initialized process group."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    if line and rank == 0:
        print(f"deepspeed_alst: {line}", file=sys.stderr, flush=True)


def report_rows(
    config: AlstConfig, engine: Any, session: Any, rows: list[tuple[str, str]], allocator: str, upstream: bool
) -> list[tuple[str, str]]:
    """Return all rows, in the order of the data's path.

    Args:
        config: this package's keys.
        engine: that is built.
        session: of sequence parallelism; None at SP 1.
        rows: of the model's patches and the engine's.
        allocator: what was done to it.
        upstream: the program was written for DeepSpeed's own ALST.
    """
    if session is None:
        return [
            ("sequence", "whole on every rank: sequence_parallel_size is 1"),
            *rows,
            ("reduction", "DeepSpeed's: alst.reduction counts where sequence_parallel_size is above 1"),
            ("allocator", allocator),
        ]
    P, dp_size, multiple = session.groups.sp_size, session.groups.dp_size, config.padding_multiple()
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    sharded = "" if engine.training_dataloader is None else "training_data sharded; "
    sharded = "UlyssesSPDataLoaderAdapter leads here; " if upstream else sharded
    return [
        ("groups", f"{P} ranks share a sequence, {dp_size} replica(s)"),
        ("data", f"{sharded}sequences padded to a multiple of {multiple} tokens"),
        ("a step", step_words(micro, accumulation, P, dp_size, multiple)),
        *rows,
        ("model check", "off: the program is written for shards" if upstream else _CHECK[config.alst.check_model]),
        ("allocator", allocator),
    ]


def reduction_rows(
    engine: Any, reduction: Reduction, path: ReductionPath, adder: str, bucket: str
) -> list[tuple[str, str]]:
    """Return the rows on the gradient sums' dtype, cost and buckets; ``bucket`` is the size's source."""
    ranks = dist.get_world_size()
    sizes = [getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters() if param.requires_grad]
    numel, stage = sum(sizes), int(engine.zero_optimization_stage())
    reductions, sent = path.reductions(engine), path.bytes_sent(engine)
    # A parameter larger than the bucket is reduced alone.
    at_once = min(numel, max(path.bucket_size or numel, *sizes, 0))
    # Send and receive buffers, and on stage 0 this rank's shard of the sums.
    widest = max(dtype.itemsize for dtype in path.hops)
    extra = min(2 * reduction.slice_bytes, 2 * at_once * widest + (at_once // ranks * widest if stage == 0 else 0))
    wire = ", then ".join(_short(dtype) for dtype in path.hops)
    adder = f" ({adder})" if reduction.dtype == torch.float32 else ""
    if path.bucket_size is None:
        buckets = f"none on this path: {bucket} is not used"
    else:
        buckets = f"{path.bucket_size:,} elements ({bucket})"
    in_step = f"sent by a rank in a step ({reductions} x {numel:,} elements)"
    return [
        ("reduction", f"ZeRO stage {stage}, summed in {_short(reduction.dtype)}{adder} over {ranks} ranks"),
        ("on the wire", f"{wire}: {in_words(sent, 1, 1000)} {in_step}"),
        ("largest extra buffers", f"{in_words(extra, 1)}{path.besides}"),
        ("gradient buckets", buckets),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

"""Activation report: the enabled features, printed once on rank 0."""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from deepspeed_alst.config.parse import step_words
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.grad_reduction.reduce import Reduction
from deepspeed_alst.grad_reduction.zero_paths import ReductionPath

_SWITCHED = ("offload", "liger", "tiled MLP", "tiled loss")
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


def report_rows(run: Any, engine: Any, features: list[Any], allocator: str) -> list[tuple[str, str]]:
    """Return all rows, in the order of the data's path.

    Args:
        run: RunContext of the call.
        engine: that is built.
        features: those that are on.
        allocator: description of its setting.
    """
    rows = [row for feature in features for row in feature.report()]
    off = [name for name in _SWITCHED if name not in dict(rows)]
    rows += [("off", ", ".join(off))] if off else []
    if run.session is None:
        return [
            ("sequence", "whole on every rank: sequence_parallel_size is 1"),
            *rows,
            ("reduction", "DeepSpeed's: alst.reduction counts where sequence_parallel_size is above 1"),
            ("allocator", allocator),
        ]
    groups, multiple = run.session.groups, run.config.padding_multiple()
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    sharded = "" if engine.training_dataloader is None else "training_data sharded; "
    if run.upstream is not None:
        sharded, check = "UlyssesSPDataLoaderAdapter leads here; ", "off: the program is written for shards"
    else:
        check = _CHECK[run.config.alst.check_model]
    return [
        ("groups", f"{groups.sp_size} ranks share a sequence, {groups.dp_size} replica(s)"),
        ("data", f"{sharded}sequences padded to a multiple of {multiple} tokens"),
        ("a step", step_words(micro, accumulation, groups.sp_size, groups.dp_size, multiple)),
        *rows,
        ("model check", check),
        ("allocator", allocator),
    ]


def reduction_rows(
    engine: Any, reduction: Reduction, path: ReductionPath, adder: str, bucket: str
) -> list[tuple[str, str]]:
    """Return the rows on the gradient sums' dtype, cost and buckets; ``bucket`` is the size's source."""
    ranks = dist.get_world_size()
    sizes = [getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters() if param.requires_grad]
    numel, stage = sum(sizes), int(engine.zero_optimization_stage())
    sent = path.bytes_sent(engine)
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
    in_step = f"sent by a rank in a step ({path.reductions} x {numel:,} elements)"
    return [
        ("reduction", f"ZeRO stage {stage}, summed in {_short(reduction.dtype)}{adder} over {ranks} ranks"),
        ("on the wire", f"{wire}: {format_bytes(sent, 1, 1000)} {in_step}"),
        ("largest extra buffers", f"{format_bytes(extra, 1)}{path.besides}"),
        ("gradient buckets", buckets),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

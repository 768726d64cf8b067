"""The activation report: what was switched on, printed once on rank 0."""

from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from deepspeed_alst.config import AlstConfig
from deepspeed_alst.engine.reduction import ReductionPath
from deepspeed_alst.parallel.groups import SequenceGroups
from deepspeed_alst.parallel.reduction import Reduction


def print_report(rows: list[tuple[str, str]]) -> None:
    """Print the report as a table; two columns, what and how."""
    table = Table(title="deepspeed_alst", title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    # A log file has no width of its own; rows are sentences and must not be cut.
    Console(stderr=True, width=120).print(table)


def report_rows(
    config: AlstConfig,
    groups: SequenceGroups,
    engine: Any,
    attention: str,
    tiles: list[tuple[str, str]],
    reduced: list[tuple[str, str]],
    allocator: str,
    adopted: bool,
) -> list[tuple[str, str]]:
    """What is on, in the order of the data's way; ``adopted``: the program was written for DeepSpeed's own ALST."""
    P, multiple = groups.sp_size, config.padding_multiple()
    sharded = "" if engine.training_dataloader is None else "training_data sharded; "
    loss = "of the whole sequence on every rank"
    if adopted:
        sharded = "UlyssesSPDataLoaderAdapter leads here; "
        loss = (
            "of this rank's shard, which the program aggregates (DeepSpeed's mpu); TiledMLP, TiledFusedLogitsLoss: ours"
        )
    return [
        ("groups", f"{P} ranks share a sequence, {groups.dp_size} replica(s)"),
        ("data", f"{sharded}sequences padded to a multiple of {multiple} tokens"),
        ("attention", attention),
        ("loss", loss),
        *tiles,
        *reduced,
        ("allocator", allocator),
        ("not used", "liger_kernel, offload (not yet available)"),
    ]


def reduction_rows(
    engine: Any, reduction: Reduction, path: ReductionPath, adder: str, bucket: str
) -> list[tuple[str, str]]:
    """What gradients are summed in and by what, what that costs, and the buckets; ``bucket`` says whose size it is."""
    ranks = dist.get_world_size()
    sizes = [getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters() if param.requires_grad]
    numel, stage = sum(sizes), int(engine.zero_optimization_stage())
    reductions = engine.gradient_accumulation_steps() if path.each_micro_step else 1
    sent = numel * sum(dtype.itemsize for dtype in path.hops) * (ranks - 1) / ranks * reductions
    # A parameter larger than the bucket is reduced alone.
    at_once = min(numel, max(path.bucket_size or numel, *sizes, 0))
    extra = min(2 * reduction.slice_bytes, 2 * at_once * max(dtype.itemsize for dtype in path.hops))
    wire = ", then ".join(_short(dtype) for dtype in path.hops)
    adder = f" ({adder})" if reduction.dtype == torch.float32 else ""
    if path.bucket_size is None:
        buckets = f"none on this path: {bucket} is not used"
    else:
        buckets = f"{path.bucket_size:,} elements ({bucket})"
    return [
        ("reduction", f"ZeRO stage {stage}, summed in {_short(reduction.dtype)}{adder} over {ranks} ranks"),
        ("on the wire", f"{wire}: {sent / 1e6:,.1f} MB sent by a rank in a step ({reductions} x {numel:,} elements)"),
        ("largest extra buffers", f"{extra / 2**20:,.1f} MiB{path.besides}"),
        ("gradient buckets", buckets),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

"""The activation report: what was switched on, printed once on rank 0."""

from typing import Any

from rich.console import Console
from rich.table import Table

from deepspeed_alst.config import AlstConfig
from deepspeed_alst.parallel.groups import SequenceGroups


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
        (
            "reduction",
            f"ZeRO stage {int(engine.zero_optimization_stage())}, gradients summed in "
            f"{config.seq_parallel_communication_data_type} over {P * groups.dp_size} ranks",
        ),
        ("allocator", allocator),
        ("not used", "liger_kernel, offload (not yet available)"),
    ]

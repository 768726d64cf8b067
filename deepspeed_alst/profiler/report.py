"""Text report of a ledger."""

import io
from typing import Any

from rich.console import Console
from rich.table import Table

from deepspeed_alst.profiler.blocks import START, Moment
from deepspeed_alst.profiler.flops import is_attention
from deepspeed_alst.profiler.scopes import BACKWARD, FORWARD, RECOMPUTE
from deepspeed_alst.profiler.timeline import Peak

_NUM_PARTS = 8


def format_bytes(moment: Moment) -> str:
    """Format a moment, as in ``step 1, backward of model.layers.0.mlp, aten.mm``."""
    module = f"{moment.part} of {moment.module}" if moment.module else moment.part
    return ", ".join(word for word in (moment.phase, module, moment.operator) if word)


def report(ledger: Any) -> str:
    """Format tables of the peak by owner, its largest parts, and FLOPs by operator and part."""
    out = io.StringIO()
    # Fixed width, since a file has none; module paths must not be cut.
    console = Console(file=out, width=180)
    peak = ledger.peak
    console.print(f"Peak: {peak.bytes:,} bytes. {format_bytes(peak.moment)}")
    console.print(_owners(peak))
    console.print("Its largest parts, by what allocated them:")
    console.print(_parts(peak))
    console.print(f"FLOPs: {ledger.matmul_flops:,} in matrix products, {ledger.attention_flops:,} in attention.")
    console.print(_flops(ledger))
    return out.getvalue()


def _table(*headers: str) -> Table:
    table = Table()
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left")
    return table


def _owners(peak: Peak) -> Table:
    table = _table("owner", "bytes", "of the peak")
    for category, num_bytes in sorted(peak.owners.items(), key=lambda item: -item[1]):
        if num_bytes:
            share = "beside it" if category == "host" else f"{num_bytes / peak.bytes:.1%}"
            table.add_row(category, f"{num_bytes:,}", share)
    return table


def _parts(peak: Peak) -> Table:
    table = _table("allocated in", "owner", "blocks", "bytes")
    for part in peak.parts[:_NUM_PARTS]:
        allocated = "before the start" if part.birth == START else format_bytes(part.birth)
        table.add_row(allocated, part.category, f"{part.num_blocks:,}", f"{part.num_bytes:,}")
    return table


def _flops(ledger: Any) -> Table:
    """Build the table of FLOPs by operator and part of the step; fused attention is marked."""
    parts = sorted({spent.part for spent in ledger.spent}, key=(FORWARD, RECOMPUTE, BACKWARD).index)
    table = _table("operator", *parts, "all")
    for operator, flops in ledger.flops.most_common():
        by_part = [
            sum(n for spent, n in ledger.spent.items() if (spent.operator, spent.part) == (operator, part))
            for part in parts
        ]
        name = f"{operator} (attention)" if is_attention(operator) else operator
        table.add_row(name, *(f"{n:,}" for n in by_part), f"{flops:,}")
    return table

"""Text and pictures: a ledger's report, memory over a step, and loss curves."""

import io
import itertools
from collections.abc import Collection
from typing import Any

from rich.console import Console
from rich.table import Table

from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.profiler.owners import BACKWARD, CATEGORIES, FORWARD, RECOMPUTE, START, Category, Sample

_NUM_PARTS = 8
# A plot is about 1,000 pixels wide. With more samples, only the first and highest of each stretch are drawn.
_MAX_STRETCHES = 2000
# Share of the width that the label of a forward or backward needs.
_NAMED_SHARE = 0.03
_LOOKS: dict[Category, tuple[str, str]] = {
    "weights": ("weights", "#7f7f7f"),
    "gradients": ("gradients", "#8c564b"),
    "residual": ("layer inputs, norms", "#1f77b4"),
    "attention": ("attention", "#ff7f0e"),
    "tiles": ("MLP", "#2ca02c"),
    "logits": ("logits and loss", "#d62728"),
    "communication": ("communication", "#9467bd"),
    "other": ("other", "#c7c7c7"),
    "host": ("offload buffers, on the host", "black"),
}
"""Each owner's name and colour, the same in every plot."""
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


def report(ledger: Any) -> str:
    """Format tables of the peak by owner, its largest parts, and FLOPs by operator and part of the step."""
    peak, parts = ledger.peak, (FORWARD, RECOMPUTE, BACKWARD)
    owners, allocations = _table("owner", "memory", "of the peak"), _table("allocated in", "owner", "memory")
    for owner, size in sorted(peak.owners.items(), key=lambda item: -item[1]):
        if size:
            owners.add_row(owner, format_bytes(size), "not included" if owner == "host" else f"{size / peak.bytes:.1%}")
    for (owner, birth), size in peak.parts.most_common(_NUM_PARTS):
        allocations.add_row("before the start" if birth == START else str(birth), owner, format_bytes(size))
    operators = _table("operator", *parts, "all")
    for operator, flops in ledger.flops.most_common():
        by_part = dict.fromkeys(parts, 0)
        for spent, each in ledger.spent.items():
            by_part[spent.part] += each if spent.operator == operator else 0
        operators.add_row(operator, *(f"{each:,}" for each in (*by_part.values(), flops)))
    out = io.StringIO()
    # Fixed width, since a file has none; module paths must not be cut.
    console = Console(file=out, width=180)
    console.print(f"Peak: {format_bytes(peak.bytes)} at {peak.moment}")
    console.print(owners)
    console.print("Largest parts of the peak, by what allocated them:")
    console.print(allocations)
    console.print(f"FLOPs: {ledger.matmul_flops:,} in matmuls, {ledger.attention_flops:,} in fused attention")
    console.print(operators)
    return out.getvalue()


def draw(timelines: dict[str, list[Sample]], path: str, left_out: Collection[Category] = (), top: int = 0) -> None:
    """Plot live bytes by owner as stacked areas, one step below another; host memory is a dashed line.

    Args:
        timelines: samples of each step by name; the name may be empty.
        path: a PNG, or another format by its suffix.
        left_out: owners that are not drawn.
        top: end of the shared scale in bytes; 0: above the highest.
    """
    samples_of_all = [sample for samples in timelines.values() for sample in samples]
    shown = [each for each in CATEGORIES if each not in left_out and any(s.bytes[each] for s in samples_of_all)]
    owners = [each for each in shown if each != "host"]
    totals = {name: [sum(each.bytes[o] for o in owners) for each in samples] for name, samples in timelines.items()}
    most = top or max(map(max, totals.values()))
    unit, unit_name = next((size, name) for size, name in _UNITS if most >= size or size == 1)
    figure = new_figure(12, 5 if len(timelines) == 1 else 2.8 * len(timelines))
    all_axes = figure.subplots(len(timelines), sharey=True, squeeze=False)[:, 0]
    for axes, (name, samples) in zip(all_axes, timelines.items(), strict=True):
        peak = max(range(len(samples)), key=totals[name].__getitem__)
        _stack(axes, samples, _thinned(totals[name]), owners, unit)
        if "host" in shown:
            heights, (label, color) = [each.bytes["host"] / unit for each in samples], _LOOKS["host"]
            axes.plot(heights, label=label, color=color, linestyle="--", linewidth=1)
        height = totals[name][peak] / unit
        axes.plot([peak], [min(height, most / unit)], "v", color="black", clip_on=False)
        said = f"peak {height:.2f} {unit_name}"
        axes.set_title(f"{name}; {said}" if name else f"{said}: {samples[peak].moment}", loc="left", fontsize=10)
        axes.set_ylabel(f"live {unit_name}")
    all_axes[0].set_ylim(0, top / unit if top else None)
    all_axes[0].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, reverse=True)
    all_axes[-1].set_xlabel("allocations and releases, in order")
    figure.savefig(path, dpi=120 if len(timelines) == 1 else 90)


def draw_curves(title: str, curves: dict[str, dict[str, list[float]]], path: str) -> None:
    """Plot curves over the optimizer steps, one chart per quantity.

    Args:
        title: of the figure.
        curves: by quantity with its unit, then by run. Later runs are thinner, so that equal ones stay visible.
        path: a PNG, or another format by its suffix.
    """
    figure = new_figure(6 * len(curves), 4.5)
    figure.suptitle(title)
    for axes, (quantity, runs) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for place, (name, values) in enumerate(runs.items()):
            steps = range(1, len(values) + 1)
            axes.plot(steps, values, label=name, linewidth=max(1.0, 5.0 - 3 * place), marker=".")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(quantity)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float) -> Any:
    """Return a figure without pyplot, which would change the program's own figures and backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _table(*headers: str) -> Table:
    table = Table()
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left")
    return table


def _stack(axes: Any, samples: list[Sample], places: list[int], owners: list[Category], unit: int) -> None:
    heights = [[samples[place].bytes[each] / unit for place in places] for each in owners]
    labels, colors = zip(*(_LOOKS[each] for each in owners), strict=True)
    axes.stackplot(places, heights, labels=labels, colors=colors, step="post", linewidth=0)
    for place, name in _boundaries(samples):
        axes.axvline(place, color="grey", linewidth=0.8)
        inside = {"xytext": (3, -3), "textcoords": "offset points", "va": "top"}
        axes.annotate(name, (place, 1), xycoords=("data", "axes fraction"), fontsize=8, color="grey", **inside)
    axes.margins(x=0)


def _boundaries(timeline: list[Sample]) -> list[tuple[int, str]]:
    """Return where forward and backward alternate, if long enough for a label; recomputation is in the backward."""
    found, place = [], 1
    for is_forward, stretch in itertools.groupby(timeline[1:], key=lambda sample: sample.moment.part == FORWARD):
        length = len(list(stretch))
        if length >= _NAMED_SHARE * len(timeline):
            found.append((place, FORWARD if is_forward else BACKWARD))
        place += length
    return found


def _thinned(totals: list[int]) -> list[int]:
    """Return indices of the samples to draw: the first and the highest of each stretch, and the last."""
    stretch = max(1, len(totals) // _MAX_STRETCHES)
    starts = range(0, len(totals), stretch)
    highest = {max(range(at, min(at + stretch, len(totals))), key=totals.__getitem__) for at in starts}
    return sorted({*starts, *highest, len(totals) - 1})

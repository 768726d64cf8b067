"""Plots of memory over a step."""

from collections.abc import Collection

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepspeed_alst.profiler.owners import CATEGORIES, Category
from deepspeed_alst.profiler.report import format_bytes
from deepspeed_alst.profiler.timeline import Sample

# A plot is some 1,000 pixels wide. With more samples, only the first and highest of each stretch are drawn.
_MAX_SAMPLES = 4000
# Share of the width: a shorter stretch of forward or backward has no room for a label.
_NAMED_SHARE = 0.03
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


def draw(
    timelines: dict[str, list[Sample]], path: str, left_out: Collection[Category] = ("host",), top: int = 0
) -> None:
    """Plot live bytes by owner as stacked areas, one step below another, with peaks and phases.

    Args:
        timelines: samples of each step by name; the name may be empty.
        path: a PNG, or another format by its suffix.
        left_out: owners that are not drawn.
        top: end of the shared scale in bytes; 0: above the highest.
    """
    owners = [each for each in CATEGORIES if each not in left_out and _has(timelines.values(), each)]
    totals = {name: [sum(each.bytes[o] for o in owners) for each in samples] for name, samples in timelines.items()}
    most = top or max(map(max, totals.values()))
    unit, unit_name = next((size, name) for size, name in _UNITS if most >= size or size == 1)
    # Without pyplot, to keep the program's own figures and backend.
    figure = Figure(figsize=(12, 5 if len(timelines) == 1 else 2.8 * len(timelines)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(timelines), sharey=True, squeeze=False)[:, 0]
    for axes, (name, samples) in zip(all_axes, timelines.items(), strict=True):
        peak = max(range(len(samples)), key=totals[name].__getitem__)
        _stack(axes, samples, _thinned(totals[name], peak), owners, unit)
        height = totals[name][peak] / unit
        axes.plot([peak], [min(height, most / unit)], "v", color="black", clip_on=False)
        said = f"peak {height:.2f} {unit_name}: {format_bytes(samples[peak].moment)}"
        axes.set_title(f"{name}; {said}" if name else said, loc="left", fontsize=10)
        axes.set_ylabel(f"live {unit_name}")
    all_axes[0].set_ylim(0, top / unit if top else None)
    all_axes[0].legend(*_top_first(all_axes[0]), loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    all_axes[-1].set_xlabel("allocations and releases")
    figure.savefig(path, dpi=120 if len(timelines) == 1 else 90)


def _has(timelines: Collection[list[Sample]], owner: Category) -> bool:
    return any(sample.bytes[owner] for samples in timelines for sample in samples)


def _stack(axes: Axes, samples: list[Sample], places: list[int], owners: list[Category], unit: int) -> None:
    heights = [[samples[place].bytes[each] / unit for place in places] for each in owners]
    axes.stackplot(places, heights, labels=owners, step="post", linewidth=0)
    for place, name in _boundaries(samples):
        axes.axvline(place, color="grey", linewidth=0.8)
        axes.annotate(name, (place, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="grey")
    axes.margins(x=0)


def _top_first(axes: Axes) -> tuple[list[Artist], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def _boundaries(timeline: list[Sample]) -> list[tuple[int, str]]:
    """Return where a phase starts or forward and backward alternate, if long enough for a label."""
    found: list[tuple[int, str]] = []
    before = None
    for place, sample in enumerate(timeline[1:], start=1):
        now = (sample.moment.phase, "forward" if sample.moment.part == "forward" else "backward")
        if now != before:
            found.append((place, " ".join(dict.fromkeys(word for word in now if word))))
            before = now
    ends = [place for place, _ in found[1:]] + [len(timeline)]
    shortest = _NAMED_SHARE * len(timeline)
    return [each for each, end in zip(found, ends, strict=True) if end - each[0] >= shortest]


def _thinned(totals: list[int], peak: int) -> list[int]:
    """Return indices of the samples to draw: first and highest of each stretch, and the peak."""
    stretch = max(1, 2 * len(totals) // _MAX_SAMPLES)
    places = {peak, len(totals) - 1}
    for first in range(0, len(totals), stretch):
        last = min(first + stretch, len(totals))
        places |= {first, max(range(first, last), key=totals.__getitem__)}
    return sorted(places)

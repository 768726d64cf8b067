"""The timeline of memory over a step, drawn."""

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepspeed_alst.ledger.owners import CATEGORIES
from deepspeed_alst.ledger.report import in_words
from deepspeed_alst.ledger.timeline import Peak, Sample

# A picture is some 1,000 dots wide: of more samples than this, each stretch's first and highest are drawn.
_MAX_SAMPLES = 4000
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes"))


def draw(timeline: list[Sample], peak: Peak, path: str) -> None:
    """Stacked areas by owner over a step's allocations, host left out; the peak and the phases are marked."""
    owners = [each for each in CATEGORIES if each != "host" and any(sample.bytes[each] for sample in timeline)]
    places = _thinned(timeline, peak.place)
    unit, unit_name = next((size, name) for size, name in _UNITS if peak.bytes >= size or size == 1)
    # Without pyplot: a program's own figures and its choice of a backend are left alone.
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    heights = [[timeline[place].bytes[each] / unit for place in places] for each in owners]
    axes.stackplot(places, heights, labels=owners, step="post", linewidth=0)
    axes.plot([peak.place], [peak.bytes / unit], "v", color="black")
    axes.set_title(f"peak {peak.bytes / unit:.2f} {unit_name}: {in_words(peak.moment)}", loc="left", fontsize=10)
    for place, name in _boundaries(timeline):
        axes.axvline(place, color="grey", linewidth=0.8)
        axes.annotate(name, (place, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8, color="grey")
    axes.set_xlabel("allocations and releases")
    axes.set_ylabel(f"live {unit_name}")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.legend(*_top_first(axes), loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=120)


def _top_first(axes: Axes) -> tuple[list[Artist], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def _boundaries(timeline: list[Sample]) -> list[tuple[int, str]]:
    """Where a phase starts, or where it goes from forward to backward and back."""
    found: list[tuple[int, str]] = []
    before = None
    for place, sample in enumerate(timeline[1:], start=1):
        now = (sample.moment.phase, sample.moment.part == "forward")
        if now != before:
            part = "forward" if now[1] else "backward"
            found.append((place, " ".join(word for word in (now[0], part) if word)))
            before = now
    return found


def _thinned(timeline: list[Sample], peak: int) -> list[int]:
    """Places of the samples that are drawn: of each stretch its first and its highest, and the peak."""
    stretch = max(1, 2 * len(timeline) // _MAX_SAMPLES)
    places = {peak, len(timeline) - 1}
    for first in range(0, len(timeline), stretch):
        last = min(first + stretch, len(timeline))
        places |= {first, max(range(first, last), key=lambda each: timeline[each].total)}
    return sorted(places)

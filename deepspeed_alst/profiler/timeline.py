"""Memory over a step, from the events of its blocks."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from deepspeed_alst.profiler.blocks import START, Block, Event, Moment
from deepspeed_alst.profiler.owners import CATEGORIES, Category


class Sample(NamedTuple):
    """Live bytes by category after an event."""

    bytes: dict[Category, int]
    moment: Moment

    @property
    def total(self) -> int:
        """Bytes on the device: all categories but host."""
        return sum(self.bytes.values()) - self.bytes["host"]


class Part(NamedTuple):
    """Blocks of one owner, allocated by one operator of one module in one part of a step."""

    category: str
    birth: Moment
    num_blocks: int
    num_bytes: int


class Peak(NamedTuple):
    """Peak of live bytes on the device, with its moment and owners."""

    bytes: int
    moment: Moment
    owners: dict[Category, int]
    """Bytes by category; host is listed but not part of the peak."""
    parts: list[Part]
    """Breakdown of the peak, the largest first."""
    place: int
    """Index of the sample in the timeline."""


def samples_of(initial: list[Event], events: list[Event]) -> Iterator[Sample]:
    """Yield the state before the first event, then after each."""
    live: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
    for event in initial:
        live[event.block.category] += event.change
    yield Sample(dict(live), START)
    for event in events:
        live[event.block.category] += event.change
        yield Sample(dict(live), event.moment)


def peak_of(samples: list[Sample], initial: list[Event], events: list[Event]) -> Peak:
    """Return the first of the highest samples, and the blocks that were live."""
    index = max(range(len(samples)), key=lambda each: samples[each].total)
    sizes: Counter[Block] = Counter()
    for event in [*initial, *events[:index]]:
        sizes[event.block] += event.change
    num_bytes: Counter[tuple[str, Moment]] = Counter()
    num_blocks: Counter[tuple[str, Moment]] = Counter()
    for block, size in sizes.items():
        if size and block.category != "host":
            num_bytes[block.category, block.birth] += size
            num_blocks[block.category, block.birth] += 1
    parts = [Part(*key, num_blocks[key], size) for key, size in num_bytes.most_common()]
    return Peak(samples[index].total, samples[index].moment, samples[index].bytes, parts, index)

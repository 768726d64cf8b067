"""The course of memory over a step, told from the events of its blocks."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from deepspeed_alst.ledger.blocks import START, Block, Event, Moment
from deepspeed_alst.ledger.owners import CATEGORIES, Category


class Sample(NamedTuple):
    """Live bytes by category after an event."""

    bytes: dict[Category, int]
    moment: Moment

    @property
    def total(self) -> int:
        """Bytes on the device: all categories but host."""
        return sum(self.bytes.values()) - self.bytes["host"]


class Part(NamedTuple):
    """Blocks of one owner that one operator of one module allocated in one part of a step."""

    category: str
    birth: Moment
    num_blocks: int
    num_bytes: int


class Peak(NamedTuple):
    """The most bytes that lived at once on the device, when, and whose they were."""

    bytes: int
    moment: Moment
    owners: dict[Category, int]
    """Bytes by category; host is beside the peak, not in it."""
    parts: list[Part]
    """The same in detail, the largest first."""
    place: int
    """Of the sample in the timeline."""


def samples_of(initial: list[Event], events: list[Event]) -> Iterator[Sample]:
    """The state before the first event, then after each."""
    live: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
    for event in initial:
        live[event.block.category] += event.change
    yield Sample(dict(live), START)
    for event in events:
        live[event.block.category] += event.change
        yield Sample(dict(live), event.moment)


def peak_of(samples: list[Sample], initial: list[Event], events: list[Event]) -> Peak:
    """The first of the highest samples, and the blocks that lived then."""
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

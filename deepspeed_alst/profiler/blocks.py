"""Memory blocks, created when a storage is first seen and freed with it, and their events in order.

The owner of a block may become known after its creation (autograd turns a product into a weight's gradient), so an
event refers to its block, and the owner is looked up at the end.
"""

import functools
import weakref
from typing import NamedTuple

import torch

from deepspeed_alst.profiler.owners import Category


class Moment(NamedTuple):
    """Time of an event, or origin of a block."""

    phase: str
    """Name given by the program (``Ledger.phase``), or empty."""
    part: str
    """forward, recompute (a forward inside the backward) or backward."""
    module: str
    """Path of the module in forward or backward; the class name for the model; empty outside it."""
    operator: str


START = Moment("", "forward", "", "")


class Block:
    """One storage."""

    __slots__ = ("birth", "category", "num_bytes", "parameters")

    def __init__(self, category: Category, birth: Moment) -> None:
        self.category: Category = category
        self.birth = birth
        self.num_bytes = 0
        # Names of its parameters by offset in elements.
        self.parameters: dict[int, str] = {}


class Event(NamedTuple):
    """Change of a block's size in bytes."""

    block: Block
    change: int
    moment: Moment


# Final owner if several claim a block: the highest wins. Categories not listed yield to any other.
_CLAIMS: dict[str, int] = {"communication": 1, "gradients": 2, "weights": 3, "host": 4}


class Blocks:
    """Live storages with their blocks, and the events since the ledger was opened."""

    def __init__(self) -> None:
        self.moment = START
        """Moment of current events."""
        self.initial: list[Event] = []
        """Blocks that existed before the ledger; they count from the start, even if first seen later."""
        self.events: list[Event] = []
        self._alive: dict[int, tuple[Block, weakref.ref]] = {}
        self._sum: tuple[int, Block, Block] | None = None

    def find(self, storage: torch.UntypedStorage) -> Block | None:
        """Return the block of a storage, or None if it was not seen."""
        entry = self._alive.get(storage._cdata)
        return entry[0] if entry is not None else None

    def see(self, storage: torch.UntypedStorage, category: Category, *, initial: bool = False) -> Block:
        """Return the block of a storage with its current size; create it for this owner if new."""
        block = self.find(storage)
        if block is None:
            block = Block(category, START if initial else self.moment)
            key = storage._cdata
            # The Python object of a storage lives as long as the storage, even if only autograd holds it.
            self._alive[key] = (block, weakref.ref(storage, functools.partial(self._free, key)))
            self._resize(block, storage.nbytes(), self.initial if initial else self.events)
        elif block.num_bytes != storage.nbytes():
            self._resize(block, storage.nbytes(), self.events)
        return block

    def claim(self, block: Block, category: Category) -> None:
        """Change the owner for the block's lifetime, past and future, unless a stronger owner has it."""
        if _CLAIMS.get(category, 0) >= _CLAIMS.get(block.category, 0):
            block.category = category

    def expect_sum_in_place(self, first: Block, second: Block) -> None:
        """Expect that autograd would compute the newest block, a sum, in place of an input.

        Autograd reuses an input without other references, but not under a dispatch mode. The input that is freed before
        any other operator runs is the one it would reuse, so its release is recorded before the sum's creation.
        """
        self._sum = (len(self.events) - 1, first, second)

    def forget_sum(self) -> None:
        """Drop the expected in-place sum when another operator runs."""
        self._sum = None

    def close(self) -> None:
        """Stop tracking storages."""
        self._alive.clear()

    def _free(self, key: int, reference: weakref.ref) -> None:
        block, _ = self._alive.pop(key, (None, None))
        if block is None:
            return
        place = len(self.events)
        if self._sum is not None and any(block is each for each in self._sum[1:]):
            place, self._sum = self._sum[0], None
        self.events.insert(place, Event(block, -block.num_bytes, self.moment))
        block.num_bytes = 0

    def _resize(self, block: Block, num_bytes: int, events: list[Event]) -> None:
        events.append(Event(block, num_bytes - block.num_bytes, self.moment))
        block.num_bytes = num_bytes

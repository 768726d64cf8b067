"""Blocks of memory: born when a storage is first seen, gone when it is freed, and their events in order.

A block's owner may be found out later than its birth (a product becomes a weight's gradient when autograd hands it on),
so events name the block and who owns it is asked at the end.
"""

import functools
import weakref
from typing import NamedTuple

import torch

from deepspeed_alst.ledger.owners import Category


class Moment(NamedTuple):
    """When something happened, or what allocated a block."""

    phase: str
    """As the program named it (``Ledger.phase``), or empty."""
    part: str
    """forward, recompute (a forward inside of the backward) or backward."""
    module: str
    """Path of the module that runs, or whose backward runs; for the model itself its class; empty outside of it."""
    operator: str


START = Moment("", "forward", "", "")


class Block:
    """One storage."""

    __slots__ = ("birth", "category", "num_bytes", "parameters")

    def __init__(self, category: Category, birth: Moment) -> None:
        self.category: Category = category
        self.birth = birth
        self.num_bytes = 0
        # Names of the parameters in it, by their offset in elements.
        self.parameters: dict[int, str] = {}


class Event(NamedTuple):
    """A block grew or shrank by so many bytes."""

    block: Block
    change: int
    moment: Moment


# Who owns a block for good when several claim it; what is not here is claimed by any other.
_CLAIMS: dict[str, int] = {"communication": 1, "gradients": 2, "weights": 3, "host": 4}


class Blocks:
    """The storages that live, each with its block, and the events since the ledger was opened."""

    def __init__(self) -> None:
        self.moment = START
        """Of what happens now."""
        self.initial: list[Event] = []
        """What lived before: it counts from the start, also where it is seen only later."""
        self.events: list[Event] = []
        self._alive: dict[int, tuple[Block, weakref.ref]] = {}
        self._sum: tuple[int, Block, Block] | None = None

    def find(self, storage: torch.UntypedStorage) -> Block | None:
        """The block of a storage that was seen."""
        entry = self._alive.get(storage._cdata)
        return entry[0] if entry is not None else None

    def see(self, storage: torch.UntypedStorage, category: Category, *, initial: bool = False) -> Block:
        """The block of a storage, which is born with this owner if it was not seen before; its size is brought up."""
        block = self.find(storage)
        if block is None:
            block = Block(category, START if initial else self.moment)
            key = storage._cdata
            # The object of a storage lives as long as the storage itself, also where only autograd holds it.
            self._alive[key] = (block, weakref.ref(storage, functools.partial(self._free, key)))
            self._resize(block, storage.nbytes(), self.initial if initial else self.events)
        elif block.num_bytes != storage.nbytes():
            self._resize(block, storage.nbytes(), self.events)
        return block

    def claim(self, block: Block, category: Category) -> None:
        """Change the owner, for the block's whole life, unless a stronger one has it."""
        if _CLAIMS.get(category, 0) >= _CLAIMS.get(block.category, 0):
            block.category = category

    def expect_sum_in_place(self, first: Block, second: Block) -> None:
        """The newest block is the sum of two, which autograd makes in place of one of them if nobody else holds it.

        It does not under a dispatch mode. One that is freed before anything else happens is the one that it would have
        taken: it is freed before the sum is born.
        """
        self._sum = (len(self.events) - 1, first, second)

    def forget_sum(self) -> None:
        """Another operator runs."""
        self._sum = None

    def close(self) -> None:
        """Follow nothing any more."""
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

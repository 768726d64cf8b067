"""Live bytes by owner: storages as blocks, from first use to release, and who their memory belongs to.

An owner may become known after the allocation (autograd turns a product into a weight's gradient), so an event refers
to its block, and owners are looked up at the end.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple, get_args

import torch

from deepspeed_alst.errors import AlstError

Category = Literal["weights", "gradients", "residual", "attention", "tiles", "logits", "communication", "other", "host"]
"""``residual`` is the stream between the blocks with its norms and embeddings; ``tiles`` are the MLPs, tiled or not;
``other`` is memory of no module (inputs, optimizer states); ``host`` is memory off the device."""
CATEGORIES: tuple[Category, ...] = get_args(Category)
# Final owner if several claim a block: the highest wins. Categories not listed yield to any other.
_CLAIMS: dict[str, int] = {"communication": 1, "gradients": 2, "weights": 3, "host": 4}
_NOBODY = nullcontext()
# The owner method of the one open ledger, or nothing.
_open: list[Callable[[Category], AbstractContextManager[None]]] = []


def owner(category: Category) -> AbstractContextManager[None]:
    """Assign allocations inside to ``category``; a no-op of well under 1 us without a ledger.

    Raises:
        AlstError: a ledger is open and has no such category.
    """
    return _open[0](category) if _open else _NOBODY


@contextmanager
def opened(own: Callable[[Category], AbstractContextManager[None]]) -> Iterator[None]:
    """Direct ``owner`` to this function inside the block.

    Raises:
        AlstError: a ledger is open already.
    """
    if _open:
        raise AlstError("a ledger is open already: two would each count what the other does; close the first one")
    _open.append(own)
    try:
        yield
    finally:
        _open.clear()


class Moment(NamedTuple):
    """Time of an event, or origin of a block."""

    part: str
    """forward, recompute (a forward inside the backward) or backward."""
    module: str
    """Path of the module in forward or backward; the class name for the model; empty outside it."""
    operator: str

    def __str__(self) -> str:
        """Format as in ``backward of model.layers.0.mlp, aten.mm``."""
        module = f"{self.part} of {self.module}" if self.module else self.part
        return f"{module}, {self.operator}" if self.operator else module


START = Moment("forward", "", "")


class Sample(NamedTuple):
    """Live bytes by category after an event."""

    bytes: dict[Category, int]
    moment: Moment

    @property
    def total(self) -> int:
        """Bytes on the device: all categories but host."""
        return sum(self.bytes.values()) - self.bytes["host"]


class Peak(NamedTuple):
    """Peak of live bytes on the device."""

    bytes: int
    moment: Moment
    owners: dict[Category, int]
    """Bytes by category; host is listed but not part of the peak."""
    parts: Counter[tuple[Category, Moment]]
    """Bytes of the peak by owner and by what allocated them."""


class Block:
    """One storage."""

    __slots__ = ("birth", "category", "num_bytes")

    def __init__(self, category: Category, birth: Moment) -> None:
        self.category, self.birth, self.num_bytes = category, birth, 0

    def claim(self, category: Category) -> None:
        """Change the owner for the block's lifetime, past and future, unless a stronger owner has it."""
        if _CLAIMS.get(category, 0) >= _CLAIMS.get(self.category, 0):
            self.category = category


class Blocks:
    """Live storages with their blocks, and the events since the ledger was opened: block, change in bytes, moment."""

    def __init__(self) -> None:
        self.moment = START
        """Moment of current events."""
        # Blocks that existed before the ledger count from the start, even if first seen later.
        self._initial: list[tuple[Block, int]] = []
        self._events: list[tuple[Block, int, Moment]] = []
        self._alive: dict[int, tuple[Block, weakref.ref]] = {}
        self._sum: tuple[int, list[Block]] = (0, [])

    def find(self, storage: torch.UntypedStorage) -> Block | None:
        """Return the block of a storage, or None if it was not seen."""
        entry = self._alive.get(storage._cdata)
        return entry[0] if entry is not None else None

    def see(self, storage: torch.UntypedStorage, category: Category, *, initial: bool = False) -> Block:
        """Return the block of a storage with its current size; create it for this owner if new."""
        block = self.find(storage)
        if block is None:
            block, key = Block(category, START if initial else self.moment), storage._cdata
            # The Python object of a storage lives as long as the storage, even if only autograd holds it.
            self._alive[key] = (block, weakref.ref(storage, functools.partial(self._free, key)))
            if initial:
                block.num_bytes = storage.nbytes()
                self._initial.append((block, block.num_bytes))
        if change := storage.nbytes() - block.num_bytes:
            self._events.append((block, change, self.moment))
            block.num_bytes += change
        return block

    def expect_sum_in_place(self, inputs: list[Block]) -> None:
        """Expect that autograd would compute the newest block, a sum, in place of an input; nothing if empty.

        Autograd reuses an input without other references, but not under a dispatch mode. The input that is freed before
        any other operator runs is the one it would reuse, so its release is recorded before the sum's creation.
        """
        self._sum = (len(self._events) - 1, inputs)

    def close(self) -> None:
        """Stop tracking storages."""
        self._alive.clear()

    def samples(self) -> Iterator[Sample]:
        """Yield the state before the first event, then after each."""
        live: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        for block, num_bytes in self._initial:
            live[block.category] += num_bytes
        yield Sample(dict(live), START)
        for block, change, moment in self._events:
            live[block.category] += change
            yield Sample(dict(live), moment)

    def peak(self) -> Peak:
        """Return the first of the highest samples, and the blocks that were live."""
        index, highest = max(enumerate(self.samples()), key=lambda each: each[1].total)
        parts: Counter[tuple[Category, Moment]] = Counter()
        for block, change, *_ in [*self._initial, *self._events[:index]]:
            if block.category != "host":
                parts[block.category, block.birth] += change
        return Peak(highest.total, highest.moment, highest.bytes, +parts)

    def _free(self, key: int, reference: weakref.ref) -> None:
        block, _ = self._alive.pop(key, (None, None))
        if block is None:
            return
        place, inputs = self._sum
        if block in inputs:
            self._sum = (0, [])
        else:
            place = len(self._events)
        self._events.insert(place, (block, -block.num_bytes, self.moment))
        block.num_bytes = 0

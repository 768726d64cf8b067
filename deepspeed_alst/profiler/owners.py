"""Live bytes by owner: storages as blocks, and the running module, to which an allocation belongs.

An owner may become known after the allocation (autograd turns a product into a weight's gradient), so an event refers
to its block, and owners are looked up at the end. The running module is known by hooks in forward, and in backward by
autograd's sequence numbers, which are per thread: forward and backward must run in one.
"""

import functools
import re
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from deepspeed_alst.errors import AlstError

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"
Category = Literal["weights", "gradients", "residual", "attention", "tiles", "logits", "communication", "other", "host"]
"""``residual`` is the stream between the blocks with its norms and embeddings; ``tiles`` are the MLPs, tiled or not;
``other`` is memory of no module (inputs, optimizer states); ``host`` is memory off the device."""
CATEGORIES: tuple[Category, ...] = get_args(Category)
# Final owner if several claim a block: the highest wins. Categories not listed yield to any other.
_CLAIMS: dict[str, int] = {"communication": 1, "gradients": 2, "weights": 3, "host": 4}
# Attribute names or class name suffixes of transformers models and most others.
_HEADS = ("lm_head", "embed_out", "output_projection")
_ATTENTION = re.compile(r"(self_)?(attn|attention)|.*(attention|attn)\d?", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|block_sparse_moe|experts|.*(mlp|feedforward|moeblock|experts)", re.I)
_NOBODY = nullcontext()
# The owner method of the one open ledger, or nothing.
_open: list[Callable[[Category], AbstractContextManager[None]]] = []


def owner(category: Category) -> AbstractContextManager[None]:
    """Assign allocations inside to ``category``; a no-op without a ledger, AlstError for an unknown one."""
    return _open[0](category) if _open else _NOBODY


@contextmanager
def opened(own: Callable[[Category], AbstractContextManager[None]]) -> Iterator[None]:
    """Direct ``owner`` to this function inside the block; raise AlstError if a ledger is open already."""
    if _open:
        raise AlstError("a ledger is open already, and its memory would be counted too; close it first")
    _open.append(own)
    try:
        yield
    finally:
        _open.clear()


class Moment(NamedTuple):
    """Time of an event, or origin of a block."""

    part: str  # forward, recompute (a forward inside the backward) or backward
    module: str  # path; the class name for the model; empty outside it
    operator: str

    def __str__(self) -> str:
        """Format as in ``backward of model.layers.0.mlp, aten.mm``."""
        module = f"{self.part} of {self.module}" if self.module else self.part
        return f"{module}, {self.operator}" if self.operator else module


START = Moment(FORWARD, "", "")


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
    owners: dict[Category, int]  # host is listed but not part of the peak
    parts: Counter[tuple[Category, Moment]]  # by owner and by what allocated them


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
        self.moment = START  # of current events
        # Blocks that existed before the ledger count from the start, even if first seen later.
        self._initial: list[tuple[Block, int]] = []
        self._events: list[tuple[Block, int, Moment]] = []
        self.alive: dict[int, tuple[Block, weakref.ref]] = {}
        self._sum: tuple[int, list[Block]] = (0, [])

    def find(self, storage: torch.UntypedStorage) -> Block | None:
        """Return the block of a storage, or None if it was not seen."""
        entry = self.alive.get(storage._cdata)
        return entry[0] if entry is not None else None

    def see(self, storage: torch.UntypedStorage, category: Category, *, initial: bool = False) -> Block:
        """Return the block of a storage with its current size; create it for this owner if new."""
        block = self.find(storage)
        if block is None:
            block, key = Block(category, START if initial else self.moment), storage._cdata
            # The Python object of a storage lives as long as the storage, even if only autograd holds it.
            self.alive[key] = (block, weakref.ref(storage, functools.partial(self._free, key)))
            if initial:
                block.num_bytes = storage.nbytes()
                self._initial.append((block, block.num_bytes))
        if change := storage.nbytes() - block.num_bytes:
            self._events.append((block, change, self.moment))
            block.num_bytes += change
        return block

    def expect_sum_in_place(self, inputs: list[Block]) -> None:
        """Record the release of one of ``inputs`` before the newest block, a sum that autograd would write to it.

        Autograd reuses an input without other references, but not under a dispatch mode; it is the input that is freed
        before any other operator runs.
        """
        self._sum = (len(self._events) - 1, inputs)

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
        block, _ = self.alive.pop(key, (None, None))
        if block is None:
            return
        place, inputs = self._sum
        if block in inputs:
            self._sum = (0, [])
        else:
            place = len(self._events)
        self._events.insert(place, (block, -block.num_bytes, self.moment))
        block.num_bytes = 0


class Scope(NamedTuple):
    """Running code: its category, or None if memory inherits its inputs' owner, and its module."""

    category: Category | None
    module: str


_OUTSIDE = Scope(None, "")


@dataclass
class _Entry:
    """Scope that was entered and not left."""

    holder: object
    scope: Scope
    node: Any  # autograd node that ran then, if any


class Scopes:
    """Stack of open scopes, and marks: scopes by the first of their autograd nodes' sequence numbers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = {id(module): _scope_of(path, module) for path, module in model.named_modules()}
        self._parameters = {id(param): name for name, param in model.named_parameters()}
        self.entries: list[_Entry] = []
        self._numbers: list[int] = []
        self._marked: list[Scope] = []

    def enter_module(self, module: torch.nn.Module) -> None:
        """Enter a module's forward; without its own category it inherits the enclosing one, or else is ``residual``."""
        around, _ = self.now()
        known = self._modules.get(id(module))
        category, path = known or Scope(None, around.module)
        # A program may call the decoder without the model around it, as DeepSpeed's tiled loss requires.
        self._enter(module, Scope(category or around.category or ("residual" if known else None), path))

    def leave_module(self, module: torch.nn.Module) -> None:
        """Leave a module, also after an exception. After the head, the enclosing module computes logits and loss."""
        self._leave(module)
        is_head = self._modules.get(id(module), _OUTSIDE).category == "logits"
        if is_head and self.entries and self.entries[-1].scope.category in (None, "residual"):
            self.entries[-1].scope = self.entries[-1].scope._replace(category="logits")
            self._mark(self.now()[0])

    @contextmanager
    def owner(self, category: Category) -> Iterator[None]:
        """Give allocations inside this owner."""
        holder = object()
        self._enter(holder, Scope(category, self.now()[0].module))
        try:
            yield
        finally:
            self._leave(holder)

    def now(self) -> tuple[Scope, str]:
        """Return the current scope and the part of the step."""
        node = torch._C._current_autograd_node()
        top = self.entries[-1] if self.entries else None
        if node is None:
            return (top.scope if top else _OUTSIDE), FORWARD
        builds_graph = torch.is_grad_enabled()
        if top is not None and top.node is node:
            # An owner set inside a backward does not make it a recomputation; a module does.
            in_module = any(each.node is node and isinstance(each.holder, torch.nn.Module) for each in self.entries)
            return top.scope, RECOMPUTE if builds_graph or in_module else BACKWARD
        if (parameter := self._parameter_of(node)) is not None:
            scope = Scope("gradients", parameter)
        else:
            place = bisect_right(self._numbers, node._sequence_nr())
            scope = self._marked[place - 1] if place else _OUTSIDE
        if builds_graph:
            # The operator's own node already has its number.
            self._mark(scope, torch.autograd._get_sequence_nr() - 1)
        return scope, RECOMPUTE if builds_graph else BACKWARD

    def accumulates(self) -> bool:
        """Return True if autograd is accumulating the gradient of a model parameter."""
        node = torch._C._current_autograd_node()
        return node is not None and self._parameter_of(node) is not None

    def _enter(self, holder: object, scope: Scope) -> None:
        self.entries.append(_Entry(holder, scope, torch._C._current_autograd_node()))
        self._mark(scope)

    def _leave(self, holder: object) -> None:
        """Leave a scope and those above it, which an exception left without their hooks."""
        place = next((at for at, entry in reversed([*enumerate(self.entries)]) if entry.holder is holder), None)
        if place is not None:
            del self.entries[place:]
            self._mark(self.now()[0])

    def _mark(self, scope: Scope, number: int | None = None) -> None:
        number = torch.autograd._get_sequence_nr() if number is None else number
        while self._numbers and self._numbers[-1] >= number:
            self._numbers.pop()
            self._marked.pop()
        if not self._marked or self._marked[-1] != scope:
            self._numbers.append(number)
            self._marked.append(scope)

    def _parameter_of(self, node: Any) -> str | None:
        """Return the name of the parameter whose gradient a node accumulates, or None."""
        return self._parameters.get(id(getattr(node, "variable", None)))


def _scope_of(path: str, module: torch.nn.Module) -> Scope:
    """Return the category that a module starts, or None to inherit, and its path."""
    name, kind = path.rsplit(".", 1)[-1], type(module).__name__
    own: Category | None = None
    if name in _HEADS:
        own = "logits"
    elif any(map(_ATTENTION.fullmatch, (name, kind))):
        own = "attention"
    elif any(map(_MLP.fullmatch, (name, kind))):
        own = "tiles"
    return Scope(own, path or kind)

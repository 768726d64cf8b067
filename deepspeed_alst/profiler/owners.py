"""Memory owners, and the context in which code declares its allocations."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, Protocol, get_args

from deepspeed_alst.errors import AlstError

Category = Literal[
    "weights",
    "gradients",
    "residual",
    "attention",
    "tiles",
    "logits",
    "communication",
    "other",
    "host",
]
"""``residual`` is the stream between the blocks with its norms and embeddings; ``tiles`` are the MLPs, tiled or not;
``other`` is memory of no module (inputs, optimizer states); ``host`` is memory off the device."""

CATEGORIES: tuple[Category, ...] = get_args(Category)


class _Keeper(Protocol):
    def owner(self, category: Category) -> AbstractContextManager[None]: ...


class _Nobody:
    """Shared no-op context that ``owner`` returns if no ledger is open."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


_NOBODY = _Nobody()
# The one open ledger, or none. Global instead of thread-local: on CUDA, autograd runs the backward and its tiles in its
# own threads.
_open: list[_Keeper] = []


def owner(category: Category) -> AbstractContextManager[None]:
    """Assign allocations inside to ``category``; a no-op of well under 1 us without a ledger.

    Raises:
        AlstError: a ledger is open and has no such category.
    """
    return _open[0].owner(category) if _open else _NOBODY


@contextmanager
def opened(keeper: _Keeper) -> Iterator[None]:
    """Direct ``owner`` to this keeper inside the block.

    Raises:
        AlstError: another keeper is open.
    """
    if _open:
        raise AlstError("a ledger is open already: two would each count what the other does; close the first one")
    _open.append(keeper)
    try:
        yield
    finally:
        _open.clear()


def check_category(category: str) -> None:
    """Raise AlstError if the category does not exist."""
    if category not in CATEGORIES:
        raise AlstError(f"owner({category!r}): no such category. Use one of {', '.join(CATEGORIES)}")

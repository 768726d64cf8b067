"""Who can own memory, and how code says that what it allocates is its own."""

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
"""``residual`` is the stream between the blocks with its norms and embeddings; ``tiles`` are the MLPs, tiled or whole;
``other`` is what no module made (inputs, optimizer states); ``host`` is what does not lie on the device."""

CATEGORIES: tuple[Category, ...] = get_args(Category)


class _Keeper(Protocol):
    def owner(self, category: Category) -> AbstractContextManager[None]: ...


class _Nobody:
    """What ``owner`` returns where nobody keeps a ledger: one object, made once."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


_NOBODY = _Nobody()
# One for the process and not for the thread: on CUDA, autograd runs the backward, and tiles in it, in threads of its
# own. The one ledger that is open, or none.
_open: list[_Keeper] = []


def owner(category: Category) -> AbstractContextManager[None]:
    """Inside of it, allocations belong to ``category``; without a ledger this does nothing, in well under 1 us.

    Raises:
        AlstError: a ledger is open and has no such category.
    """
    return _open[0].owner(category) if _open else _NOBODY


@contextmanager
def opened(keeper: _Keeper) -> Iterator[None]:
    """``owner`` leads to this keeper inside.

    Raises:
        AlstError: another one is open.
    """
    if _open:
        raise AlstError("a ledger is open already: two would each count what the other does; close the first one")
    _open.append(keeper)
    try:
        yield
    finally:
        _open.clear()


def check_category(category: str) -> None:
    """Raises AlstError: no such category."""
    if category not in CATEGORIES:
        raise AlstError(f"owner({category!r}): no such category. Use one of {', '.join(CATEGORIES)}")

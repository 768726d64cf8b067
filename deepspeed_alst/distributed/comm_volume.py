"""Bytes that this rank sent in the all-to-alls of a group, counted at launch.

The count is keyed by group, all that every layer's forward and backward share, and is dropped with it.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

_SENT: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def count_sent(group: Any, num_bytes: int) -> None:
    """Add bytes sent from this rank to others of the group; None, the default group, is not counted."""
    if group is not None:
        _SENT[group] = _SENT.get(group, 0) + num_bytes


@contextlib.contextmanager
def uncounted(group: Any) -> Iterator[None]:
    """Exclude bytes sent over the group inside the context from the count."""
    before = sent_bytes(group)
    try:
        yield
    finally:
        if group is not None:
            _SENT[group] = before


def sent_bytes(group: Any) -> int:
    """Return the bytes counted so far."""
    return _SENT.get(group, 0)

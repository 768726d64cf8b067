"""How many bytes this rank has sent in the all-to-alls of a group: counted where they are launched.

Forward and backward of every layer share nothing but the group, so the count hangs on it, and goes when it goes.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

_SENT: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def count_sent(group: Any, num_bytes: int) -> None:
    """So many bytes leave this rank for others of the group; None, the default group, is not counted."""
    if group is not None:
        _SENT[group] = _SENT.get(group, 0) + num_bytes


@contextlib.contextmanager
def uncounted(group: Any) -> Iterator[None]:
    """Inside, what is sent over the group does not count."""
    before = sent_bytes(group)
    try:
        yield
    finally:
        if group is not None:
            _SENT[group] = before


def sent_bytes(group: Any) -> int:
    """What was counted so far."""
    return _SENT.get(group, 0)

"""The name under which one model's attention is looked up: to be read it is its core's, to be looked up it is its own.

transformers asks the name of an attention in two ways. Its special cases read it (``== "sdpa"``, ``"flash" in name``, a
regular expression): they must see the core that runs. Its interfaces look it up in a dict: they must find this model's
entry, and every other model in the process the entry that was there before.
"""

from typing import Any


class PrivateName(str):
    """The text of a core's name, with the hash of this very object.

    A dict compares hashes before it compares keys, so an entry under this object is found by this object alone, and an
    entry under the same text by everybody else. A copy, deep or pickled, is the plain text: it is part of another
    model, which has no entry.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)

"""Name of one model's attention implementation: it reads as its core's name and looks up the model's own entry.

transformers uses the name in two ways. Its special cases read it (``== "sdpa"``, ``"flash" in name``, a regular
expression) and must see the core that runs. Its interfaces look it up in a dict and must find this model's entry, while
every other model in the process finds the original one.
"""

from typing import Any


class PrivateName(str):
    """Text of a core's name, hashed by object identity.

    A dict compares hashes before keys, so an entry under this object is found by this object alone, and an entry under
    the same text by all other strings. A copy, deep or pickled, is the plain text: it belongs to another model, which
    has no entry.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return object.__hash__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)

"""Methods of one live engine, replaced on the instance alone and given back."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def wrap_method(engine: Any, name: str, wrapper: Callable[[Any], Any], undo: ExitStack) -> None:
    """Put ``wrapper(method)`` in a method's place, on this engine only; ``undo.close()`` gives it back."""
    before = engine.__dict__.get(name)
    engine.__dict__[name] = wrapper(getattr(engine, name))

    def restore() -> None:
        if before is None:
            engine.__dict__.pop(name, None)
        else:
            engine.__dict__[name] = before

    undo.callback(restore)

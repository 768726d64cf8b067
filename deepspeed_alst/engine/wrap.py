"""Methods of one live engine, replaced on the instance alone and given back."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any


def close_at_destroy(engine: Any, undo: ExitStack) -> None:
    """Close a stack when the engine is destroyed."""

    def wrapper(destroy: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(destroy)
        def destroy_and_close(*args: Any, **kwargs: Any) -> Any:
            result = destroy(*args, **kwargs)
            undo.close()
            return result

        return destroy_and_close

    wrap_method(engine, "destroy", wrapper, undo)


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

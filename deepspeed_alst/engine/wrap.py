"""The end of an engine's life."""

import functools
from collections.abc import Callable
from typing import Any

from deepspeed_alst.core.patching import PatchSet


def close_at_destroy(engine: Any, patches: PatchSet) -> None:
    """Undo all patches when the engine is destroyed."""

    def wrapper(destroy: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(destroy)
        def destroy_and_close(*args: Any, **kwargs: Any) -> Any:
            result = destroy(*args, **kwargs)
            patches.close()
            return result

        return destroy_and_close

    patches.wrap(engine, "destroy", wrapper)

"""Calls isolated from their context: a trial or a proof during the caller's forward."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call in a separate thread, without the caller's modes, saved-tensor hooks, autocast and ``no_grad``.

    It is safe within a checkpointed layer, in evaluation, and among fake tensors.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()

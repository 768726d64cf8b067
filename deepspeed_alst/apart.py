"""Calls out of reach of what surrounds them: a trial or a proof, in the middle of somebody's forward."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call in a thread of its own, which no mode, saved-tensor hook, autocast or ``no_grad`` of the caller's reaches.

    So it may be called within a checkpointed layer, in an evaluation, or among fake tensors.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()

"""Work in threads of this process."""

from collections.abc import Callable
from typing import Any

import torch


def on_same_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function for another thread, on the CUDA device that is current here: a thread starts on the first."""
    if not torch.cuda.is_initialized():
        return function
    device = torch.cuda.current_device()

    def run(*args: Any) -> Any:
        torch.cuda.set_device(device)
        return function(*args)

    return run

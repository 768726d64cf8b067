"""Triton kernels, one file per op, next to its PyTorch reference; the only code that imports Triton."""

import functools
import importlib
from typing import Any


@functools.cache
def define_ops(module: str) -> Any:
    """Define the ops of a module of kernels and return ``registry.pick``; None without Triton.

    Features call it before the engine and its first collective: ``torch.library.custom_op`` makes Python repeat the
    warnings it has shown, such as those of DeepSpeed's collectives.
    """
    try:
        importlib.import_module(f"{__name__}.{module}")
    except ImportError:
        return None
    return importlib.import_module(f"{__name__}.registry").pick

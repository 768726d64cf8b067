"""Triton kernels, one file per op, next to its PyTorch reference; the only code that imports Triton."""

import contextlib
import importlib


def define_ops(module: str) -> None:
    """Define the ops of a module of kernels, if Triton is installed, before the engine and its first collective.

    ``torch.library.custom_op`` makes Python repeat the warnings it has shown, such as those of DeepSpeed's collectives.
    """
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{__name__}.{module}")

"""The mark on a model that an engine of ours has: its forward is no longer the one that it came with."""

from contextlib import ExitStack
from typing import Any

_MARK = "_deepspeed_alst_engine"


def take(model: Any, undo: ExitStack) -> None:
    """Mark a model until ``undo`` closes."""
    if hasattr(model, "__dict__"):  # else it is DeepSpeed's to refuse
        vars(model)[_MARK] = True
        undo.callback(vars(model).pop, _MARK, None)


def is_taken(model: Any) -> bool:
    """Whether an engine has the model."""
    return _MARK in getattr(model, "__dict__", {})

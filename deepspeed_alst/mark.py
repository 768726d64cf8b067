"""The mark on a model that an engine of ours has: its forward is no longer the one that it came with."""

from typing import Any

from deepspeed_alst.core.patching import PatchSet

_MARK = "_deepspeed_alst_engine"


def take(model: Any, patches: PatchSet) -> None:
    """Mark a model as an engine's."""
    if hasattr(model, "__dict__"):  # else it is DeepSpeed's to refuse
        patches.set(model, _MARK, True)


def is_taken(model: Any) -> bool:
    """Whether an engine has the model."""
    return _MARK in getattr(model, "__dict__", {})

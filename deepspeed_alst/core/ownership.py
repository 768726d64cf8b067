"""Mark on a model that an engine of this package has patched."""

from typing import Any

from deepspeed_alst.core.patching import PatchSet

_MARK = "_deepspeed_alst_engine"


def mark_owned(model: Any, patches: PatchSet) -> None:
    """Mark a model as patched by an engine."""
    if hasattr(model, "__dict__"):  # DeepSpeed rejects other types
        patches.set(model, _MARK, True)


def is_owned(model: Any) -> bool:
    """Return True if an engine has patched the model."""
    return _MARK in getattr(model, "__dict__", {})

"""Comparison of a checkpoint's weights with an engine's: names, shapes and order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.constants import PARAM_SHAPES

from deepspeed_alst.engine.checkpoint_files import stamp_of
from deepspeed_alst.errors import CheckpointError

_NAMES_SHOWN = 3

Order = tuple[tuple[str, ...], ...]
"""Parameter names by optimizer group."""


def check_same_model(engine: Any, state: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError if the checkpoint's weights have other names or shapes than the engine's.

    Raises:
        CheckpointError: names the first differences.
    """
    if engine.optimizer is None:
        return
    groups = state[PARAM_SHAPES] if engine.zero_optimization() else None
    if groups is None:
        saved = {name: tuple(x.shape) for name, x in state["module"].items() if isinstance(x, torch.Tensor)}
        ours = {name: tuple(x.shape) for name, x in engine.module.state_dict().items()}
    else:
        saved = {name: tuple(shape) for group in groups for name, shape in group.items()}
        ours = {name: tuple(shape) for group in engine._get_zero_param_shapes() for name, shape in group.items()}
    if engine.zero_optimization() and groups is None:
        raise CheckpointError(f"{folder} was saved without ZeRO, and this engine runs it")
    different = {
        "in the checkpoint only": sorted(saved.keys() - ours.keys()),
        "in the model only": sorted(ours.keys() - saved.keys()),
        "of another shape": [
            f"{name} ({list(saved[name])} saved, {list(ours[name])} here)"
            for name in sorted(saved.keys() & ours.keys())
            if saved[name] != ours[name]
        ],
    }
    parts = [
        f"{len(names)} weights {what}: {', '.join(names[:_NAMES_SHOWN])}{', ...' * (len(names) > _NAMES_SHOWN)}"
        for what, names in different.items()
        if names
    ]
    if parts:
        raise CheckpointError(f"{folder} is of another model, or one trained in other parts. {'. '.join(parts)}")


def check_same_order(engine: Any, state: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError if optimizer states would go to other weights; universal ones match by name.

    Raises:
        CheckpointError: names the first position that differs.
    """
    saved, ours = _saved_order(state), parameter_order(engine)
    problem = _order_problem(saved, ours) if saved is not None and ours is not None else None
    if problem:
        raise CheckpointError(
            f"{folder} has its weights in another order, by which DeepSpeed knows their optimizer states: {problem}. "
            "Give the optimizer its parameters in the same order (of a set they have none), or load the weights alone: "
            "load_module_only=True"
        )


def parameter_order(engine: Any) -> Order | None:
    """Return the names of the trained parameters by optimizer group; None if they are unknown."""
    if engine.optimizer is None:
        return None
    if engine.zero_optimization():
        return tuple(map(tuple, engine._get_zero_param_shapes()))
    optimizer, names = engine.optimizer, engine.param_names
    for groups in ("bf16_groups", "fp16_groups"):  # the optimizer's own groups hold fp32 copies
        if hasattr(optimizer, groups):
            found = getattr(optimizer, groups)
            break
    else:
        found = [group["params"] for group in optimizer.param_groups]
    if not all(param in names for group in found for param in group):
        return None
    return tuple(tuple(names[param] for param in group) for group in found)


def _saved_order(state: Mapping[str, Any]) -> Order | None:
    """Return the parameter order in a checkpoint's model file; None if it is unknown."""
    if state.get(PARAM_SHAPES) is not None:
        return tuple(map(tuple, state[PARAM_SHAPES]))
    stamp = stamp_of(state)
    return None if stamp is None else stamp.order


def _order_problem(saved: Order, ours: Order) -> str | None:
    """Describe the first difference of two orders; None if they are equal."""
    if saved == ours:
        return None
    if list(map(len, saved)) != list(map(len, ours)):
        return (
            f"{list(map(len, saved))} parameters by optimizer group were saved, here there are {list(map(len, ours))}"
        )
    group, place = next((g, p) for g, names in enumerate(saved) for p, name in enumerate(names) if name != ours[g][p])
    return f"in optimizer group {group}, place {place} was {saved[group][place]} and is {ours[group][place]} here"

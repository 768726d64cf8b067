"""Looks at every batch before the model sees it: is it a shard, and do all ranks of the sequence hold the same cut?

Runs as a forward pre-hook of the model. One small exchange over gloo per forward, so that all ranks raise together
and none is left waiting in an all-to-all.
"""

from contextlib import ExitStack
from typing import Any

import torch

from deepspeed_alst.errors import DataError
from deepspeed_alst.parallel.agreement import gather_objects
from deepspeed_alst.parallel.groups import SequenceGroups

_WAY_OUT = "loader = deepspeed_alst.shard_dataloader(loader, engine)"


def guard_batches(model: torch.nn.Module, groups: SequenceGroups, undo: ExitStack) -> None:
    """Install the check; ``undo.close()`` removes it."""

    def check(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        facts = _facts(args, kwargs)
        problem = _problem(gather_objects(facts, groups.sp_control_group))
        if problem:
            raise DataError(problem)
        # transformers would keep every layer's keys and values of the shard, which nothing reads.
        kwargs.setdefault("use_cache", False)
        return args, kwargs

    handle = model.register_forward_pre_hook(check, prepend=True, with_kwargs=True)
    undo.callback(handle.remove)


def _facts(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Any, int]:
    """What this rank's batch looks like: a problem of its own, its shape, and its first position."""
    tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    positions = kwargs.get("position_ids")
    if args or tokens is None:
        return "call the engine with keyword arguments: engine(**batch)", None, 0
    if kwargs.get("attention_mask") is not None:
        return "it has an attention_mask, which the sharded loader would have checked and dropped", None, 0
    if positions is None:
        return "it has no position_ids", None, 0
    if kwargs.get("labels") is not None and kwargs.get("shift_labels") is None:
        return "it has labels, but no shift_labels", None, 0
    return None, tuple(tokens.shape[:2]), int(positions.reshape(-1)[0])


def _problem(everyone: list[tuple[str | None, Any, int]]) -> str | None:
    """Why these are not the shards of one sequence, or None. The same answer on every rank."""
    for rank, (problem, _, _) in enumerate(everyone):
        if problem:
            return _unsharded(f"rank {rank} of the sequence: {problem}")
    shapes = [shape for _, shape, _ in everyone]
    if len(set(shapes)) > 1:
        return _unsharded(f"the ranks' shards have different shapes: {shapes}")
    expected = [rank * shapes[0][1] for rank in range(len(everyone))]
    starts = [start for _, _, start in everyone]
    if starts != expected:
        return _unsharded(
            f"the ranks' position_ids start at {starts}, where shards of one sequence start at {expected}"
        )
    return None


def _unsharded(why: str) -> str:
    return f"a batch reached the engine that is not split over the ranks of its sequence ({why}). Add: {_WAY_OUT}"

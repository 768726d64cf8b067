"""Looks at every batch before the model sees it: is it a shard, and do all ranks of a sequence hold the same cut?

Runs as a forward pre-hook of the model: one small exchange over gloo and two scalars read from the device per forward
(not per layer), so that all ranks raise together and none is left waiting in a collective.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.errors import DataError
from deepspeed_alst.parallel.agreement import gather_objects
from deepspeed_alst.parallel.groups import SequenceGroups

_WAY_OUT = (
    "Call engine(**batch) with the whole batch of the sharded loader; for a loader of your own, add: "
    "loader = deepspeed_alst.shard_dataloader(loader, engine)"
)


@dataclass(frozen=True)
class _Facts:
    """What a rank's batch looks like."""

    problem: str | None = None
    shape: tuple[int, ...] = ()
    """Batch and shard length."""
    start: int = 0
    """The first token's position."""


def guard_batches(model: torch.nn.Module, groups: SequenceGroups, undo: ExitStack) -> None:
    """Install the check; ``undo.close()`` removes it."""

    def check(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            facts = _facts(module, args, kwargs)
        except Exception as error:
            # The others wait in the exchange below, whatever is wrong with this batch.
            facts = _Facts(f"it cannot be read: {error!r}. {_WAY_OUT}")
        # Over all ranks and not the sequence's: the other replicas would wait in the gradients' reduction.
        problem = _problem(gather_objects(facts, groups.control_group), groups.sp_size)
        if problem:
            raise DataError(problem)
        # transformers would keep every layer's keys and values of the shard, which nothing reads.
        kwargs["use_cache"] = False
        return args, kwargs

    handle = model.register_forward_pre_hook(check, prepend=True, with_kwargs=True)
    undo.callback(handle.remove)


def _facts(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Facts:
    tokens = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    positions, labels, shifted = (kwargs.get(key) for key in ("position_ids", "labels", "shift_labels"))
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        return _Facts("it asks for a cache: generation is not yet available under sequence parallelism")
    if kwargs.get("output_router_logits") or getattr(module.config, "output_router_logits", False):
        return _Facts(
            "it asks for output_router_logits: the router's auxiliary loss is not yet available; set it to False"
        )
    if args or tokens is None:
        return _Facts(f"it is not given by keyword. {_WAY_OUT}")
    if kwargs.get("attention_mask") is not None:
        return _Facts(f"it has an attention_mask, which the sharded loader would have checked and dropped. {_WAY_OUT}")
    if positions is None:
        return _Facts(f"it has no position_ids, so it is not split over the ranks. {_WAY_OUT}")
    if labels is not None and shifted is None:
        return _Facts(f"it has labels, but no shift_labels, so it is not split over the ranks. {_WAY_OUT}")
    if labels is not None and not torch.equal(labels[:, 1:].to(shifted.device), shifted[:, :-1]):
        return _Facts(
            "its labels are not its shift_labels moved by one: the loss is made of shift_labels, so change labels in "
            "the dataset or the collate_fn, before the batch is split"
        )
    return _Facts(shape=tuple(tokens.shape[:2]), start=int(positions.reshape(-1)[0]))


def _problem(everyone: list[_Facts], sp_size: int) -> str | None:
    """Why these are not the shards of sequences, or None. The same answer on every rank."""
    for rank, facts in enumerate(everyone):
        if facts.problem:
            return f"a batch reached the engine on rank {rank} that cannot be trained on: {facts.problem}"
    for first in range(0, len(everyone), sp_size):
        ranks = everyone[first : first + sp_size]
        shapes = [facts.shape for facts in ranks]
        starts, expected = [facts.start for facts in ranks], [place * shapes[0][1] for place in range(sp_size)]
        if len(set(shapes)) > 1 or starts != expected:
            return (
                f"batches reached the engine that are not split over the ranks of their sequence: ranks {first} to "
                f"{first + sp_size - 1} have shapes {shapes} and position_ids that start at {starts}. {_WAY_OUT}"
            )
    return None

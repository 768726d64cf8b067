"""Indexing, reshaping and transposing of a SequenceTensor: what is done to dims of tokens is done to their places."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_iter

from deepspeed_alst.whole_sequence.token_rows import Row, run_on_rows

if TYPE_CHECKING:
    from deepspeed_alst.whole_sequence.sequence_tensor import SequenceTensor


def select(x: "SequenceTensor", key: Any) -> Any:
    """Index dims of tokens by the places, the others by the rows; NotImplemented if an index mixes them."""
    keys = list(key) if isinstance(key, tuple) else [key]
    consumed = [_dims_of(each) for each in keys]
    if None in consumed:
        return NotImplemented
    missing = x.dim() - sum(consumed)
    if any(each is Ellipsis for each in keys):
        at = next(place for place, each in enumerate(keys) if each is Ellipsis)
        keys[at : at + 1] = [slice(None)] * missing
    lead: list[Any] = []
    left = x.num_lead
    while keys and left > 0:
        left -= _dims_of(keys[0])
        lead.append(keys.pop(0))
    if left < 0:
        return NotImplemented
    if keys and any(isinstance(each, torch.Tensor | list) for each in lead):
        if any(not (isinstance(each, slice) and each == slice(None)) for each in keys):
            return NotImplemented
        keys = []
    found = x.at(lambda index: index[tuple(lead)]) if lead else x
    if not keys:
        return found
    keys = [_numbers(each) if isinstance(each, torch.Tensor | list) else each for each in keys]
    if sum(isinstance(each, torch.Tensor) for each in keys) > 1 or any(
        isinstance(each, torch.Tensor) and each.dim() == x.dim() for each in keys
    ):
        return NotImplemented
    trail = tuple(keys)
    if not hasattr(found, "like"):  # of few tokens
        return found[(*[slice(None)] * (found.dim() - x.dim() + x.num_lead), *trail)]
    return found.like(run_on_rows(lambda rows: rows[(slice(None), *trail)], Row(found.rows)))


def _numbers(key: Any) -> torch.Tensor:
    """Return an index of a tensor or a list as numbers: a mask has another size on each run."""
    key = torch.as_tensor(key)
    return key.nonzero().flatten() if key.dtype in (torch.bool, torch.uint8) and key.dim() == 1 else key


def _dims_of(key: Any) -> Any:
    """Return how many dims an index consumes; None if it is not known."""
    if key is Ellipsis or key is None:
        return 0
    if isinstance(key, torch.Tensor):
        if hasattr(key, "places"):  # a SequenceTensor
            return None
        return key.dim() if key.dtype in (torch.bool, torch.uint8) and key.dim() else 1
    return 1 if isinstance(key, int | slice | list) and not isinstance(key, bool) else None


def reshape(x: "SequenceTensor", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``view`` and the like; NotImplemented if dims of tokens and others mix."""
    if args[0] is not x or any(isinstance(each, torch.Tensor) for each in tree_iter((args[1:], kwargs))):
        return NotImplemented
    if any(isinstance(each, torch.dtype) for each in tree_iter((args[1:], kwargs))):
        return NotImplemented
    shape = func(torch.empty(x.shape, device="meta"), *args[1:], **kwargs).shape
    trail = x.shape[x.num_lead :]
    if len(trail) and shape[-len(trail) :] == trail and len(shape) > len(trail):
        return x.at(lambda index: index.reshape(shape[: -len(trail)]))
    # The dims of tokens as they are, those behind them in other shapes.
    if shape[: x.num_lead] == x.shape[: x.num_lead]:
        inner = shape[x.num_lead :]
        return x.like(run_on_rows(lambda rows: rows.reshape(len(rows), *inner), Row(x.rows)))
    return NotImplemented


def transpose(x: "SequenceTensor", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run ``transpose`` or ``permute``; NotImplemented if dims of tokens and others mix."""
    if args[0] is not x:
        return NotImplemented
    order = list(range(x.dim()))
    if func.__name__ == "permute":
        given = kwargs.get("dims", args[1] if len(args) == 2 else args[1:])
        order = [each % x.dim() for each in given]
    else:
        first, second = (each % x.dim() for each in (*args[1:], *kwargs.values()))
        order[first], order[second] = order[second], order[first]
    lead = x.num_lead
    if order[lead:] == list(range(lead, x.dim())):
        return x.at(lambda index: index.permute(order[:lead]))
    if order[:lead] == list(range(lead)):
        inner = [0, *(each - lead + 1 for each in order[lead:])]
        return x.like(run_on_rows(lambda rows: rows.permute(inner), Row(x.rows)))
    return NotImplemented

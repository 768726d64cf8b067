"""Outputs that transformers records of modules inside a layer, such as a mixture's router logits.

Its hooks append them to lists of the model's forward. A layer in chunks records each tile's, returns those of all
tokens with its own output, so that their gradients come back, and appends these.

Legend: B batch, s tokens of a rank's shard, t of a tile.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from transformers.utils.output_capturing import _active_collector

from deepspeed_alst.errors import UnsupportedModelError

MARKS = ("transformers.modeling_utils",)
"""Module of a hook that only marks embeddings as requiring a gradient."""
HOOKS = ("transformers.utils.output_capturing", *MARKS)
"""Modules of hooks of which the first do nothing unless a forward asks for records."""
# Inputs and outputs of whole layers; an attention in chunks has no weights to record.
_OUTSIDE = ("hidden_states", "_hidden_states_layers", "attentions")


class Record(NamedTuple):
    """One recorded output of a tile's tokens."""

    key: str
    x: torch.Tensor
    """``[B, t, ...]``"""
    is_flat: bool
    """True if it was recorded as ``[B*t, ...]``."""


def wanted_records() -> list[str]:
    """Return what the model's forward records inside of layers."""
    return [key for key in _active_collector.get() or {} if key not in _OUTSIDE]


def records_layers() -> bool:
    """Return True if the model's forward records inputs or outputs of whole layers."""
    return any(key in _OUTSIDE[:2] for key in _active_collector.get() or {})


def append_records(records: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Append outputs of all tokens, by key, to the records of the model's forward."""
    for key, x in records:
        _active_collector.get()[key].append(x)


@contextlib.contextmanager
def recording(keys: Iterable[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Yield lists for the records made inside the context, which the model's forward does not get."""
    found: dict[str, list[torch.Tensor]] = {key: [] for key in keys}
    token = _active_collector.set(found)
    try:
        yield found
    finally:
        _active_collector.reset(token)


def of_tile(found: dict[str, list[torch.Tensor]], B: int, t: int) -> list[Record]:
    """Return a tile's records by token.

    Raises:
        UnsupportedModelError: a record has no row per token.
    """
    records = []
    for key, x in ((key, x) for key, each in found.items() for x in each):
        is_flat = x.shape[:1] == (B * t,)
        if not is_flat and x.shape[:2] != (B, t):
            raise UnsupportedModelError(
                f"alst.memory_lean_layer: a layer records {key} of shape {list(x.shape)} for {t} tokens of {B} "
                f"samples, which chunks cannot join. Do not ask for {key}, or set the key to false"
            )
        records.append(Record(key, x.unflatten(0, (B, t)) if is_flat else x, is_flat))
    return records

"""Packed documents in layers that carry a state along the sequence: it starts anew with each of them.

Legend: S whole sequence, N documents.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx")
"""Names under which transformers' layers are told of documents. A rank's ``seq_idx`` is of its shard only."""


class Documents:
    """Where the documents end in the layer call that is under way."""

    def __init__(self) -> None:
        self.bounds: torch.Tensor | None = None
        """``[N + 1]``, of the whole sequence; None where a row is one document."""

    @contextlib.contextmanager
    def of(self, bounds: torch.Tensor | None) -> Iterator[None]:
        """Inside, these are the bounds."""
        self.bounds = bounds
        try:
            yield
        finally:
            self.bounds = None

    def numbers(self, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Which document each of some tokens is part of: ``[1, length]`` int32. Before the sequence it is the first."""
        assert self.bounds is not None
        places = torch.arange(start, start + length, device=device).clamp(min=0)
        return torch.searchsorted(self.bounds[1:].to(places), places, right=True).int()[None]

    def apart(self, function: Callable[[slice], torch.Tensor], start: int, length: int, dim: int) -> torch.Tensor:
        """Call a function on one document after the other, and join what it returns along ``dim``.

        It gets the document's place among the ``length`` tokens that begin at ``start``.
        """
        assert self.bounds is not None
        inner = [bound - start for bound in self.bounds.tolist() if 0 < bound - start < length]
        cuts = itertools.pairwise([0, *inner, length])
        return torch.cat([function(slice(first, last)) for first, last in cuts], dim)


def kernel_wrapper(value: Any) -> Any:
    """Transformers' function that stands for a kernel and for what replaces it in plain torch; None if it is not one.

    With the ``kernels`` package it is inside of a module.
    """
    if isinstance(value, torch.nn.Module) and hasattr(value, "kernel_layer_name"):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    known = inspect.isfunction(value) and "is_new_implementation" in value.__code__.co_freevars
    return value if known else None


def is_plain_torch(value: Any) -> bool:
    """Whether transformers runs this function in plain torch, which cannot keep documents apart."""
    if isinstance(value, torch.nn.Module) and "forward" in vars(value):
        return False  # a kernel of the hub took its place
    return not inspect.getclosurevars(kernel_wrapper(value)).nonlocals["is_new_implementation"]

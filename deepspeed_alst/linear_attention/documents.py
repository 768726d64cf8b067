"""Packed documents in layers with a recurrent state, which restarts at each document.

Legend: S full sequence, N documents.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx")
"""Document arguments of transformers' layers. A rank's ``seq_idx`` covers its shard only."""


class Documents:
    """Document bounds of the layer call that is running."""

    def __init__(self) -> None:
        self.bounds: torch.Tensor | None = None
        """``[N + 1]``, of the full sequence; None if a row is one document."""

    @contextlib.contextmanager
    def of(self, bounds: torch.Tensor | None) -> Iterator[None]:
        """Set the document bounds in the context."""
        self.bounds = bounds
        try:
            yield
        finally:
            self.bounds = None

    def numbers(self, start: int, length: int, device: torch.device) -> torch.Tensor:
        """Return each token's document number, ``[1, length]`` int32; before the sequence it is the first's."""
        assert self.bounds is not None
        places = torch.arange(start, start + length, device=device).clamp(min=0)
        return torch.searchsorted(self.bounds[1:].to(places), places, right=True).int()[None]

    def apart(self, function: Callable[[slice], torch.Tensor], start: int, length: int, dim: int) -> torch.Tensor:
        """Call a function on each document and concatenate its results along ``dim``.

        It gets the document's slice of the ``length`` tokens that begin at ``start``.
        """
        assert self.bounds is not None
        inner = [bound - start for bound in self.bounds.tolist() if 0 < bound - start < length]
        cuts = itertools.pairwise([0, *inner, length])
        return torch.cat([function(slice(first, last)) for first, last in cuts], dim)


def kernel_wrapper(value: Any) -> Any:
    """Return transformers' function that runs a kernel or its plain torch fallback; None for any other value.

    With the ``kernels`` package the function is inside a module.
    """
    if isinstance(value, torch.nn.Module) and hasattr(value, "kernel_layer_name"):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    known = inspect.isfunction(value) and "is_new_implementation" in value.__code__.co_freevars
    return value if known else None


def is_plain_torch(value: Any) -> bool:
    """Return True if transformers runs this function in plain torch, which cannot keep documents apart."""
    if isinstance(value, torch.nn.Module) and "forward" in vars(value):
        return False  # replaced by a kernel of the hub
    return not inspect.getclosurevars(kernel_wrapper(value)).nonlocals["is_new_implementation"]

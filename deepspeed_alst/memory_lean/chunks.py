"""Sizes of chunks, saved tensors of chunks, and layer arguments sliced for a chunk."""

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.errors import SetupError


class UnsupportedLayerError(Exception):
    """Reason why a layer, or one call of it, runs on the ordinary path."""


class Sizes(NamedTuple):
    """Sizes of a pass, in tokens."""

    chunk_tokens: int
    """Tokens of a rank's shard that run at a time."""
    tile_tokens: int
    """Tokens of a chunk whose graph exists at a time."""
    key_block: int
    """Keys of a kernel call, which bound the gradients that it allocates."""


class Saved(Protocol):
    """Tensor that a forward has saved for its backward."""

    def __call__(self) -> torch.Tensor:
        """Return it on its device; it may be asked for again."""

    def prefetch(self) -> None:
        """Start the copy back to its device."""


class OnDevice:
    """A saved tensor that stays where it is."""

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def __call__(self) -> torch.Tensor:
        """Return the tensor."""
        return self._x

    def prefetch(self) -> None:
        """Do nothing."""


def cut(value: Any, part: slice, num_tokens: int) -> Any:
    """Return a layer's argument for some of its tokens.

    Raises:
        UnsupportedLayerError: more than one dim of a tensor may be that of the tokens.
    """
    if isinstance(value, tuple | list):
        return type(value)(cut(each, part, num_tokens) for each in value)
    if not isinstance(value, torch.Tensor):
        return value
    dims = [dim for dim, size in enumerate(value.shape) if size == num_tokens and (dim or value.dim() == 1)]
    if len(dims) > 1:
        raise UnsupportedLayerError(
            f"an argument of shape {list(value.shape)}, of which {dims} may be its {num_tokens} tokens, such as a mask "
            "other than of a window, chunks, packed documents or right padding without labels"
        )
    return value.narrow(dims[0], part.start, part.stop - part.start) if dims else value


def joined(tiles_BHtD: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join tiles along the tokens, in the memory order of ``[B, c, H, D]``."""
    first = tiles_BHtD[0]
    if len(tiles_BHtD) == 1:
        return first
    return torch.cat([x.transpose(1, 2) for x in tiles_BHtD], 1).transpose(1, 2)


def own_gradient(dy: torch.Tensor) -> torch.Tensor:
    """Return a gradient that may be written to: itself, if nothing else has it, or a copy; call it from a backward."""
    of_dy, of_base = references_of_a_gradient()
    base = dy._base  # such as a gradient of flat rows
    has_base_alone = base is None or (base._use_count() == 2 and sys.getrefcount(base) <= of_base)
    is_alone = has_base_alone and dy._use_count() == 1 and sys.getrefcount(dy) <= of_dy
    # The storage that is asked here is one more.
    tensors = torch._C._storage_Use_Count(dy.untyped_storage()._cdata) - 1
    is_own = is_alone and dy.is_contiguous() and tensors == (1 if base is None else 2)
    return dy if is_own else dy.clone(memory_format=torch.contiguous_format)


@functools.cache
def references_of_a_gradient() -> tuple[int, int]:
    """Count Python's references to a gradient and to its base in ``own_gradient``, if no hook has kept either."""
    found: list[tuple[int, int]] = []

    def count(dy: torch.Tensor) -> None:
        base = dy._base
        found.append((sys.getrefcount(dy), sys.getrefcount(base)))

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            count(dy)
            return dy

    with torch.enable_grad():
        Probe.apply(torch.ones(1, 1, requires_grad=True)).flatten().sin().sum().backward()
    return found[0]


def check_first_backward(is_first: bool) -> None:
    """Raise SetupError in a second backward of one graph, of which the first has released the chunks."""
    if not is_first:
        raise SetupError(
            "alst.memory_lean_layer: a second backward of one graph, whose chunks the first one has released. Run the "
            "forward again, or set memory_lean_layer to false"
        )

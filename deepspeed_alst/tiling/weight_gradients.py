"""Sum of weight gradients over the tiles of one pass."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from deepspeed_alst.errors import UnsupportedModelError


class WeightGradients:
    """Weight gradients, summed over tiles in one flat buffer and returned in the weights' dtype.

    Args:
        weights: the weights that need a gradient.
        num_tiles: number of tiles to sum; a single tile needs no buffer.
        fp32: True to sum half-precision gradients in fp32, for 4 bytes per weight during the pass.
    """

    def __init__(self, weights: Sequence[torch.Tensor], num_tiles: int, fp32: bool) -> None:
        self._weights = weights
        self._places = {id(weight): index for index, weight in enumerate(weights)}
        self._sums: list[torch.Tensor | None] = [None] * len(weights)
        self._buffers: list[torch.Tensor] = []
        if num_tiles > 1 and weights:
            half = all(weight.dtype in (torch.bfloat16, torch.float16) for weight in weights)
            self._buffers = _views(weights, torch.float32 if half and fp32 else None)

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one tile's gradients; None for a weight that the tile did not use."""
        for index, gradient in enumerate(gradients):
            if gradient is not None:
                self._add(index, gradient)

    def wants(self, weight: torch.Tensor) -> bool:
        """Return True if the weight is in this set."""
        return id(weight) in self._places

    def add_one(self, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add one tile's gradient of one weight."""
        self._add(self._places[id(weight)], gradient)

    def add_product(self, weight: torch.Tensor, left_tN: torch.Tensor, right_tK: torch.Tensor) -> None:
        """Add ``left' right [N, K]`` of one tile, if the weight is in this set."""
        if not self.wants(weight):
            return
        index = self._places[id(weight)]
        total = self._sums[index]
        if not self._buffers or self._buffers[index].dtype != left_tN.dtype:
            self._add(index, left_tN.t() @ right_tK)
        elif total is None:
            self._sums[index] = torch.mm(left_tN.t(), right_tK, out=self._buffers[index])
        else:
            torch.addmm(total, left_tN.t(), right_tK, out=total)

    def _add(self, index: int, gradient: torch.Tensor) -> None:
        total = self._sums[index]
        if total is not None:
            total.add_(gradient)
        elif self._buffers:
            self._sums[index] = self._buffers[index].copy_(gradient)
        else:
            self._sums[index] = gradient

    def sums(self) -> list[torch.Tensor | None]:
        """Return the sums in their accumulation dtype; None for a weight that no tile used."""
        return list(self._sums)

    def result(self) -> list[torch.Tensor | None]:
        """Return the sums in the weights' dtype."""
        return [
            None if total is None else total.to(weight.dtype)
            for total, weight in zip(self._sums, self._weights, strict=True)
        ]


def refuse_foreign_weights(outputs: Iterable[torch.Tensor], known: Iterable[torch.Tensor], name: str) -> None:
    """Raise if a tile's graph uses a weight outside its module, which would get no gradient.

    Raises:
        UnsupportedModelError: the forward uses a weight of another module, as a replaced ``forward`` may.
    """
    known_ids = {id(each) for each in known}
    nodes = [each.grad_fn for each in outputs if each.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        weight = getattr(node, "variable", None)
        if isinstance(weight, torch.Tensor) and id(weight) not in known_ids:
            raise UnsupportedModelError(
                f"{name} uses a weight of shape {list(weight.shape)} that is none of its own parameters: in tiles it "
                "would get no gradient. Make it a parameter of the module, or leave the tiles' key out "
                "(alst.tiled_mlp_compute, alst.tiled_logits_loss)."
            )
        new = [each for each, _ in node.next_functions if each is not None and each not in seen]
        seen.update(new)
        nodes += new


@contextlib.contextmanager
def without_hooks(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Disable the weights' hooks (``Tensor.register_hook``) inside the context: they apply to the sum.

    ``torch.autograd.grad`` would call them for every tile, and autograd once more for the sum.
    """
    kept = [(weight._backward_hooks, dict(weight._backward_hooks)) for weight in weights if weight._backward_hooks]
    for hooks, _ in kept:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.update(before)


def _views(weights: Sequence[torch.Tensor], dtype: torch.dtype | None) -> list[torch.Tensor]:
    """Allocate a buffer per weight, all in one allocation if they share a dtype."""
    kinds = {dtype or weight.dtype for weight in weights}
    if len(kinds) > 1:
        return [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    sizes = [weight.numel() for weight in weights]
    flat = torch.empty(sum(sizes), dtype=kinds.pop(), device=weights[0].device)
    return [part.view(weight.shape) for part, weight in zip(flat.split(sizes), weights, strict=True)]

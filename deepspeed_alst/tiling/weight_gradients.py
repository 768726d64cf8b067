"""Sums of weight gradients over the tiles of one pass."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch

from deepspeed_alst.errors import UnsupportedModelError


class WeightGradients:
    """Weight gradients, summed over tiles and returned in the weights' dtype.

    Args:
        weights: the weights that need a gradient.
        num_tiles: number of tiles; the gradients of a single tile are kept as they are.
        fp32: True to sum half-precision gradients in fp32, at 4 bytes per weight during the pass.
    """

    def __init__(self, weights: Sequence[torch.Tensor], num_tiles: int, fp32: bool) -> None:
        self._weights = weights
        self._ids = {id(weight) for weight in weights}
        self._is_single = num_tiles == 1
        self._fp32 = fp32 and num_tiles > 1
        self._sums: dict[int, torch.Tensor] = {}

    def __contains__(self, weight: torch.Tensor) -> bool:
        return id(weight) in self._ids

    def add(self, weight: torch.Tensor, gradient: torch.Tensor | None) -> None:
        """Add one tile's gradient of one weight; None if the tile did not use it."""
        if gradient is None:
            return
        if id(weight) in self._sums:
            self._sums[id(weight)] += gradient
        elif self._is_single:
            self._sums[id(weight)] = gradient
        else:  # a copy, because autograd may return the same tensor for two weights
            dtype = self._sum_dtype(gradient)
            self._sums[id(weight)] = gradient.to(dtype, copy=True, memory_format=torch.contiguous_format)

    def add_product(self, weight: torch.Tensor, left_tN: torch.Tensor, right_tK: torch.Tensor) -> None:
        """Add ``left' right [N, K]`` of one tile."""
        total = self._sums.get(id(weight))
        if total is None:
            product = left_tN.t() @ right_tK
            self._sums[id(weight)] = product.to(self._sum_dtype(product))
        elif total.dtype == left_tN.dtype:
            torch.addmm(total, left_tN.t(), right_tK, out=total)
        else:
            total += left_tN.t() @ right_tK

    def _sum_dtype(self, gradient: torch.Tensor) -> torch.dtype:
        return torch.promote_types(gradient.dtype, torch.float32) if self._fp32 else gradient.dtype

    def sums(self) -> list[torch.Tensor | None]:
        """Return the sums in their accumulation dtype; None for a weight that no tile used."""
        return [self._sums.get(id(weight)) for weight in self._weights]

    def result(self) -> list[torch.Tensor | None]:
        """Return the sums in the weights' dtype."""
        pairs = zip(self.sums(), self._weights, strict=True)
        return [None if total is None else total.to(weight.dtype) for total, weight in pairs]


def refuse_foreign_weights(outputs: Iterable[torch.Tensor], known: Iterable[torch.Tensor], name: str) -> None:
    """Raise UnsupportedModelError if a tile's graph uses a weight outside its module, which would get no gradient."""
    known_ids = {id(each) for each in known}
    nodes = [each.grad_fn for each in outputs if each.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        weight = getattr(node, "variable", None)
        if isinstance(weight, torch.Tensor) and id(weight) not in known_ids:
            raise UnsupportedModelError(
                f"{name} uses a weight of shape {list(weight.shape)} that is not one of its own parameters, so tiles "
                "would give it no gradient. Make it a parameter of the module, or set the key that tiles the module "
                "to false (alst.tiled_mlp_compute, alst.tiled_logits_loss)."
            )
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        nodes += new


@contextlib.contextmanager
def without_hooks(weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Disable the weights' hooks (``Tensor.register_hook``) inside the context, since they apply to the sum.

    ``torch.autograd.grad`` would call them for every tile, and autograd once more for the sum.
    """
    saved = [(weight._backward_hooks, dict(weight._backward_hooks)) for weight in weights if weight._backward_hooks]
    for hooks, _ in saved:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in saved:
            hooks.update(before)

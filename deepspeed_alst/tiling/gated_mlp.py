"""Gated MLP in closed form: ``down(act(gate(x)) * up(x))`` and its gradients, per tile, without a graph.

A tile's backward recomputes gate and up, and computes ``d_a``, the gradient of the last matrix's input. Then one pass
turns the three into the gradients of gate and up, and into ``a`` itself (kernels/gated.py). So a tile needs three
values per row and inner feature, where autograd needs six or more. Gated MLPs are detected in
tiling/detect_gated_mlp.py.

Legend: t rows of a tile, M model dim, F inner features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepspeed_alst.tiling.weight_gradients import WeightGradients

_COPIES = 3


@dataclass(frozen=True)
class GatedMlp:
    """Linears of one gated MLP module."""

    activation: str
    """One of ``kernels.gated.ACTIVATIONS``."""
    first: tuple[torch.nn.Linear, ...]
    """Linears of gate and up, in this order; or one Linear whose output holds both as halves."""
    up_comes_first: bool
    """True if up is the first half of a single Linear's output."""
    down: torch.nn.Linear

    def row_bytes(self, element_size: int) -> int:
        """Return the bytes per row in the backward: gate, up and ``d_a``. The forward needs the first two."""
        return _COPIES * self.down.in_features * element_size

    def forward(self, x_tM: torch.Tensor, out_tM: torch.Tensor) -> None:
        """Compute the module's output of one tile into ``out_tM``."""
        # Imported here to load Triton only if tiles are used.
        from deepspeed_alst.kernels.gated import gated_activation_

        gate_tF, up_tF = self.halves(self._first_outputs(x_tM))
        gated_activation_(gate_tF, up_tF, self.activation)
        _linear(gate_tF, self.down, out_tM)

    def backward(
        self, x_tM: torch.Tensor, grad_tM: torch.Tensor, sums: WeightGradients, out_tM: torch.Tensor | None
    ) -> None:
        """Compute gradients of one tile: of the weights into ``sums``, of ``x_tM`` into ``out_tM``.

        Args:
            x_tM: the tile's rows.
            grad_tM: gradient of the output of ``forward``.
            sums: gradient sums of the trainable weights; other weights are skipped.
            out_tM: output for the gradient of ``x_tM``; None to skip it.
        """
        from deepspeed_alst.kernels.gated import gated_gradients_

        made = self._first_outputs(x_tM)
        act_tF = grad_tM @ self.down.weight
        gated_gradients_(*self.halves(made), act_tF, self.activation)
        _add_gradients(sums, self.down, grad_tM, act_tF)
        del act_tF
        for linear, grad in zip(self.first, made, strict=True):
            _add_gradients(sums, linear, grad, x_tM)
        if out_tM is not None:
            torch.mm(made[0], self.first[0].weight, out=out_tM)
            for linear, grad in zip(self.first[1:], made[1:], strict=True):
                torch.addmm(out_tM, grad, linear.weight, out=out_tM)

    def _first_outputs(self, x_tM: torch.Tensor) -> list[torch.Tensor]:
        return [_linear(x_tM, linear) for linear in self.first]

    def halves(self, made: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return gate and up, ``[t, F]``, as views."""
        if len(made) == 1:
            made = made[0].split(self.down.in_features, 1)
        return made[::-1] if self.up_comes_first else made


def _linear(x: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor | None = None) -> torch.Tensor:
    if linear.bias is None:
        return torch.mm(x, linear.weight.t(), out=out)
    return torch.addmm(linear.bias, x, linear.weight.t(), out=out)


def _add_gradients(sums: WeightGradients, linear: torch.nn.Linear, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Add the gradients of W and b in ``y = x W' + b``, from the gradient of y ``[t, features]``."""
    sums.add_product(linear.weight, grad, x)
    if linear.bias is not None and sums.wants(linear.bias):
        sums.add_one(linear.bias, grad.sum(0))

"""A gated MLP in closed form: ``down(act(gate(x)) * up(x))``, and all its gradients, of one tile and without a graph.

A tile's backward makes gate and up once more, and ``d_a``, the gradient of what goes into the last matrix. Then one
pass turns the three into the gradients of gate and up, and into ``a`` itself (kernels/gated.py). So a tile needs three
values a row and inner feature, where autograd keeps and makes six or more. What is a gated MLP, and whether it may be
taken for one now, tiling/structure.py says.

Legend: t rows of a tile, M model dim, F inner features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepspeed_alst.tiling.gradients import WeightGradients

_COPIES = 3


@dataclass(frozen=True)
class GatedMlp:
    """The matrices of one, as they stand in the module."""

    activation: str
    """One of ``kernels.gated.ACTIVATIONS``."""
    first: tuple[torch.nn.Linear, ...]
    """What makes gate and up, in this order; or the one that makes both, each as a half of its output."""
    up_comes_first: bool
    """Of a matrix that makes both."""
    down: torch.nn.Linear

    def row_bytes(self, element_size: int) -> int:
        """Bytes that a row of a tile needs in the backward: gate, up and ``d_a``. The forward needs the first two."""
        return _COPIES * self.down.in_features * element_size

    def forward(self, x_tM: torch.Tensor, out_tM: torch.Tensor) -> None:
        """The module's value of one tile, into ``out_tM``."""
        # Triton is loaded where tiles are.
        from deepspeed_alst.kernels.gated import gated_activation_

        gate_tF, up_tF = self.halves(self._first_outputs(x_tM))
        gated_activation_(gate_tF, up_tF, self.activation)
        _linear(gate_tF, self.down, out_tM)

    def backward(
        self, x_tM: torch.Tensor, grad_tM: torch.Tensor, sums: WeightGradients, out_tM: torch.Tensor | None
    ) -> None:
        """Gradients of one tile from that of its value: of the weights into ``sums``, of ``x_tM`` into ``out_tM``.

        Args:
            x_tM: the tile's rows.
            grad_tM: of what ``forward`` made of them.
            sums: of the weights that train; the others are left out.
            out_tM: None if nobody wants it.
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
        """Gate and up ``[t, F]``, as views."""
        if len(made) == 1:
            made = made[0].split(self.down.in_features, 1)
        return made[::-1] if self.up_comes_first else made


def _linear(x: torch.Tensor, linear: torch.nn.Linear, out: torch.Tensor | None = None) -> torch.Tensor:
    if linear.bias is None:
        return torch.mm(x, linear.weight.t(), out=out)
    return torch.addmm(linear.bias, x, linear.weight.t(), out=out)


def _add_gradients(sums: WeightGradients, linear: torch.nn.Linear, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Of ``y = x W' + b``: those of W and b, from that of y ``[t, features]``."""
    sums.add_product(linear.weight, grad, x)
    if linear.bias is not None and sums.wants(linear.bias):
        sums.add_one(linear.bias, grad.sum(0))

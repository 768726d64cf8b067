"""Autograd function of a layer in chunks.

Legend: B batch, s tokens of a rank's shard, M hidden size.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.memory_lean.chunks import check_first_backward, own_gradient
from deepspeed_alst.memory_lean.layer import LeanCall


class LeanPass(torch.autograd.Function):
    """``apply(call, x, *weights)``: a layer's output and records. As inputs, weights get one gradient a pass each."""

    @staticmethod
    def forward(ctx: Any, call: LeanCall, x_BsM: torch.Tensor, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the layer, and save what its backward needs in the call."""
        ctx.call = call
        return call.forward(x_BsM.detach(), True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BsM: torch.Tensor, *of_records: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Run the layer's backward once.

        Raises:
            SetupError: a second backward of the same graph.
        """
        call, ctx.call = ctx.call, None
        check_first_backward(call is not None)
        dx_BsM = own_gradient(dy_BsM)
        del dy_BsM
        grads = call.backward(dx_BsM, *of_records)
        return None, dx_BsM if ctx.needs_input_grad[1] else None, *grads

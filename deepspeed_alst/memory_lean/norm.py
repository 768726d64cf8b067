"""Norms between the layers and the head in chunks of tokens: their inputs are saved as the layers' chunks are.

Legend: B batch, s tokens of a rank's shard, M hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.attention.rectangles import of_size
from deepspeed_alst.memory_lean.chunks import Saved, Sizes, check_first_backward, own_gradient
from deepspeed_alst.memory_lean.stream import ResidualStream
from deepspeed_alst.tiling.tiled_module import current_autocast, gradients_of
from deepspeed_alst.tiling.weight_gradients import WeightGradients, without_hooks

NewGroup = Callable[[], Callable[[torch.Tensor], Saved]]


class ChunkedNorm:
    """Forward of one norm, ``[B, s, M] -> [B, s, M]``, that replaces the module's."""

    def __init__(self, module: torch.nn.Module, sizes: Sizes, new_group: NewGroup, stream: ResidualStream) -> None:
        self.module, self.sizes, self.new_group, self.stream = module, sizes, new_group, stream
        self.original = module.forward
        stream.watch(module)

    @torch.compiler.disable
    def forward(self, x_BsM: torch.Tensor) -> torch.Tensor:
        """Run the norm chunk by chunk; with a graph, again in the backward."""
        if x_BsM.dim() != 3 or not self.module.training or not self.stream.calls.in_chunks:
            return self.original(x_BsM)
        has_graph = torch.is_grad_enabled()
        taken = self.stream.take(self.module, x_BsM) if has_graph else []
        y_BsM = _NormPass.apply(self, has_graph, bool(taken), x_BsM, *self.module.parameters())
        self.stream.replace(self.module, taken, y_BsM)
        return y_BsM


class _NormPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, norm: ChunkedNorm, saves: bool, in_place: bool, x_BsM: torch.Tensor, *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.norm, ctx.weights, ctx.chunks = norm, weights, of_size(0, x_BsM.shape[1], norm.sizes.chunk_tokens)
        ctx.autocast, ctx.inputs, y_BsM = current_autocast(x_BsM.device.type), list[Saved](), None
        for chunk in ctx.chunks:
            if saves:
                ctx.inputs.append(norm.new_group()(x_BsM[:, chunk]))
            y_BcM = norm.original(x_BsM[:, chunk].contiguous())
            if y_BsM is None:
                y_BsM = x_BsM if in_place and y_BcM.dtype == x_BsM.dtype else y_BcM.new_empty(x_BsM.shape)
            y_BsM[:, chunk] = y_BcM
        return y_BsM.data  # no view of the input for autograd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BsM: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        trained = [weight for weight, needs in zip(ctx.weights, ctx.needs_input_grad[4:], strict=True) if needs]
        sums = WeightGradients(trained, len(ctx.chunks), True)
        check_first_backward(bool(ctx.inputs))
        dx_BsM = own_gradient(dy_BsM)
        del dy_BsM
        with without_hooks(trained):
            for index in reversed(range(len(ctx.chunks))):
                x_BcM, of_chunk = ctx.inputs.pop()().detach().requires_grad_(), dx_BsM[:, ctx.chunks[index]]
                if index:
                    ctx.inputs[-1].prefetch()
                with torch.enable_grad(), ctx.autocast():
                    y_BcM = ctx.norm.original(x_BcM)
                dx_BcM, *grads = gradients_of(y_BcM, (x_BcM, *trained), of_chunk)
                of_chunk.copy_(dx_BcM)
                for weight, grad in zip(trained, grads, strict=True):
                    sums.add(weight, grad)
        found = iter(sums.result())
        return None, None, None, dx_BsM, *(next(found) if needs else None for needs in ctx.needs_input_grad[4:])

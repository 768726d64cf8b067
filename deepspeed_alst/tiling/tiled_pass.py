"""Tiled pass of a token-wise module: forward without a graph, each tile recomputed in backward.

The weights are inputs of the autograd function, so each gets one gradient per pass: ZeRO's and DDP's hooks fire once,
and the upstream gradient (gradient accumulation, loss scaling) is included. Over several tiles it is summed in fp32,
so that the number of tiles does not matter (tiling/weight_gradients.py). A gated MLP is computed in closed form
(tiling/gated_mlp.py), any other module by autograd.

Legend: T rows (tokens, flat), t rows of a tile.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.random_draws.draw_mode import Branch
from deepspeed_alst.tiling.weight_gradients import WeightGradients, refuse_foreign_weights, without_hooks

if TYPE_CHECKING:
    from deepspeed_alst.tiling.tiled_module import TiledModule


class TiledPass(torch.autograd.Function):
    """``apply(work, drawing, tile_rows, dims, num_rows, *rows, *weights)``: outputs of a module, ``[T, features]``."""

    @staticmethod
    def forward(
        ctx: Any,
        work: "TiledModule",
        drawing: Branch,
        tile_rows: int,
        dims: int,
        num_rows: int,
        *tensors: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Run all tiles; rows are ``[T, features]``, ``dims`` the dims of the module's input, weights all its own."""
        rows, ctx.weights = tensors[:num_rows], tensors[num_rows:]
        ctx.work, ctx.drawing, ctx.tile_rows, ctx.dims = work, drawing, tile_rows, dims
        ctx.autocast = autocast_as_here(rows[0].device.type)
        ctx.save_for_backward(*rows)
        T = rows[0].shape[0]
        # Inside a backward this is a recomputation.
        if work.value_unused and torch._C._current_graph_task_id() != -1:
            return tuple(_nobodys_value(rows[0], T, *kind) for kind in work.layout.kinds)
        form = work.closed_form(rows, dims)
        results = [] if form is None else [rows[0].new_empty(T, form.down.out_features)]
        for part in _parts(T, tile_rows):
            if form is not None:
                form.forward(rows[0][part], results[0][part])
                continue
            with drawing(part):
                outputs = work.outputs(shaped([each[part] for each in rows], dims))
            results = results or [each.new_empty(T, each.shape[-1]) for each in outputs]
            for result, output in zip(results, outputs, strict=True):
                result[part] = output
        ctx.mark_non_differentiable(*(each for each in results if not each.is_floating_point()))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Rerun each tile with its backward."""
        # Must come first: it may run a checkpoint's recomputation.
        rows = ctx.saved_tensors
        num_rows, T = len(rows), rows[0].shape[0]
        need_rows = ctx.needs_input_grad[5 : 5 + num_rows]
        need_weights = ctx.needs_input_grad[5 + num_rows :]
        trained = [weight for weight, need in zip(ctx.weights, need_weights, strict=True) if need]
        parts = _parts(T, ctx.tile_rows)
        sums = WeightGradients(trained, len(parts), ctx.work.fp32_accumulation)
        grad_rows = [torch.empty_like(each) if need else None for each, need in zip(rows, need_rows, strict=True)]
        with ctx.autocast():
            form = ctx.work.closed_form(rows, ctx.dims)
        with without_hooks(trained):
            for part in parts:
                if form is not None:
                    of_rows = None if grad_rows[0] is None else grad_rows[0][part]
                    form.backward(rows[0][part], grads[0][part], sums, of_rows)
                    continue
                leaves = [each[part].detach().requires_grad_(need) for each, need in zip(rows, need_rows, strict=True)]
                with ctx.drawing(part):
                    found, of_weights = _tile_gradients(
                        *(ctx.work, ctx.autocast, leaves, ctx.dims),
                        *([each[part] for each in grads], trained, part is parts[0]),
                    )
                sums.add(of_weights)
                for result, gradient in zip(grad_rows, found, strict=True):
                    if result is not None:
                        result[part] = 0 if gradient is None else gradient
        of_trained = iter(sums.result())
        return (
            None,
            None,
            None,
            None,
            None,
            *grad_rows,
            *(next(of_trained) if need else None for need in need_weights),
        )


def _tile_gradients(
    work: "TiledModule",
    autocast: Callable[[], Any],
    leaves: list[torch.Tensor],
    dims: int,
    grads: list[torch.Tensor],
    weights: list[torch.Tensor],
    is_first: bool,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Return one tile's gradients: of its rows ``[t, features]``, and of the weights."""
    with torch.enable_grad(), autocast():
        layer, inputs = work.last_layer, shaped(leaves, dims)
        if layer is None:
            outputs = work.outputs(inputs)
        else:
            with work.input_of_last_layer() as found:
                work.forward(*inputs)
            outputs = [found[0].flatten(0, -2)]
    if is_first:
        refuse_foreign_weights(outputs, (*leaves, *work.module.parameters()), work.name)
    of_layer: dict[int, torch.Tensor] = {}
    if layer is not None:
        of_layer, grads = _linear_gradients(layer, outputs[0], grads[0])
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    wanted = [each for each in (*leaves, *weights) if each.requires_grad]
    gradients = (
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        if pairs and wanted
        else [None] * len(wanted)
    )
    by_id = {id(each): gradient for each, gradient in zip(wanted, gradients, strict=True)}
    return [by_id.get(id(each)) for each in leaves], [of_layer.get(id(each), by_id.get(id(each))) for each in weights]


def _linear_gradients(
    layer: torch.nn.Linear, inputs: torch.Tensor, grad: torch.Tensor
) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
    """Return the gradients of W and b by id, and of x, in ``y = x W' + b``, from that of y ``[t, features]``."""
    x = inputs.detach()
    found = {}
    if layer.weight.requires_grad:
        found[id(layer.weight)] = grad.t() @ x
    if layer.bias is not None and layer.bias.requires_grad:
        found[id(layer.bias)] = grad.sum(0)
    return found, [grad @ layer.weight.detach()]


def autocast_as_here(kind: str) -> Callable[[], Any]:
    """Return a factory of the current autocast context, for a recomputation on this device type."""
    return functools.partial(
        torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


def _nobodys_value(like: torch.Tensor, T: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return a placeholder for an unused result: NaN, so that any use gives NaN gradients, not wrong ones."""
    return like.new_full((T, features), float("nan") if dtype.is_floating_point else 0, dtype=dtype)


def _parts(rows: int, tile_rows: int) -> list[slice]:
    """Return the tiles; a single empty one if there are no rows, for the output shapes."""
    return [slice(start, min(start + tile_rows, rows)) for start in range(0, max(rows, 1), tile_rows)]


def shaped(rows: Sequence[torch.Tensor], dims: int) -> list[torch.Tensor]:
    """Reshape rows ``[t, features]`` to the dims that the module expects: one batch of t tokens."""
    return [each.reshape(*[1] * (dims - 2), *each.shape) for each in rows]

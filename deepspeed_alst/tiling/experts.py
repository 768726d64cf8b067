"""Stacked MoE experts run one by one, for mixtures whose fp32 sums of weight gradients do not fit.

An expert gets all its tokens at once, so its weight gradients need no sums over tiles, or sums for itself only if it
has more tokens than a tile. It runs the module's own forward, on a shallow copy with its slice of the weights.

Legend: T tokens, k experts per token, E experts, H hidden size, n tokens of one expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.core.hf_model_spec import stacked_expert_count
from deepspeed_alst.tiling.tiled_module import TiledModule, current_autocast, gradients_of
from deepspeed_alst.tiling.weight_gradients import WeightGradients


def num_stacked_experts(module: torch.nn.Module) -> int:
    """Return E if all parameters of a module are stacked by expert, some of them 3-D; else 0."""
    params, own = list(module.parameters()), list(module.parameters(recurse=False))
    shapes = [getattr(param, "ds_shape", param.shape) for param in own]
    if len(own) != len(params) or not any(len(shape) == 3 for shape in shapes):
        return 0
    counts = {shape[0] for shape in shapes}
    return counts.pop() if len(counts) == 1 else 0


def run_by_expert(
    tiled: TiledModule, tile_rows: int, x_TH: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor
) -> torch.Tensor:
    """Run a module of stacked experts, expert by expert: ``[T, H], [T, k], [T, k] -> [T, H]``.

    ``weight_Tk`` scales the experts' outputs; ``tile_rows`` is the most tokens of one expert's tile, at least 1.
    """
    result = _ByExpert.apply(tiled, tile_rows, x_TH, index_Tk, weight_Tk, *tiled.module.parameters())
    tiled.last_node = result.grad_fn
    return result


class _ByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tiled: TiledModule,
        tile_rows: int,
        x_TH: torch.Tensor,
        index_Tk: torch.Tensor,
        weight_Tk: torch.Tensor,
        *stacks: torch.Tensor,
    ) -> torch.Tensor:
        ctx.tiled, ctx.tile_rows, ctx.stacks = tiled, tile_rows, stacks
        ctx.autocast = current_autocast(x_TH.device.type)
        ctx.save_for_backward(x_TH, index_Tk, weight_Tk)
        if tiled.is_skipped():
            return torch.full_like(x_TH, float("nan"))
        # In fp32, because k rounding errors per token would add up.
        result_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
        for expert, pairs in _tokens_by_expert(index_Tk, len(stacks[0])):
            slices = [stack[expert : expert + 1] for stack in stacks]
            for tile in pairs.split(tile_rows):
                tokens = tile // index_Tk.shape[1]
                output_nH = _run_expert(tiled.module, slices, x_TH[tokens], weight_Tk.flatten()[tile])
                result_TH.index_add_(0, tokens, output_nH.to(result_TH))
        return result_TH.to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[Any, ...]:
        x_TH, index_Tk, weight_Tk = ctx.saved_tensors
        need_x, _, need_weight, *need_stacks = ctx.needs_input_grad[2:]
        grad_x = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
        grad_weight = torch.zeros_like(weight_Tk)
        grad_stacks = [
            torch.zeros_like(stack) if need else None for stack, need in zip(ctx.stacks, need_stacks, strict=True)
        ]
        for expert, pairs in _tokens_by_expert(index_Tk, len(ctx.stacks[0])):
            slices = [
                stack.detach()[expert : expert + 1].requires_grad_(need)
                for stack, need in zip(ctx.stacks, need_stacks, strict=True)
            ]
            tiles = pairs.split(ctx.tile_rows)
            sums = WeightGradients(slices, len(tiles), ctx.tiled.fp32_accumulation)
            for tile in tiles:
                tokens = tile // index_Tk.shape[1]
                leaves = [x_TH[tokens].requires_grad_(need_x), weight_Tk.flatten()[tile].requires_grad_(need_weight)]
                with torch.enable_grad(), ctx.autocast():
                    y = _run_expert(ctx.tiled.module, slices, *leaves)
                dx, dweight, *dslices = gradients_of(y, (*leaves, *slices), grad_TH[tokens].to(y.dtype))
                if need_x:
                    grad_x.index_add_(0, tokens, dx.to(grad_x))
                if need_weight:
                    grad_weight.view(-1)[tile] = dweight
                for each, gradient in zip(slices, dslices, strict=True):
                    sums.add(each, gradient)
            for grad, dslice in zip(grad_stacks, sums.result(), strict=True):
                if grad is not None:
                    grad[expert : expert + 1] = dslice
        grad_x, grad_weight = grad_x.to(x_TH.dtype) if need_x else None, grad_weight if need_weight else None
        return (None, None, grad_x, None, grad_weight, *grad_stacks)


def _tokens_by_expert(index_Tk: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each expert that has tokens, with their positions in the flattened index."""
    flat = index_Tk.flatten()
    positions = flat.argsort(stable=True)
    # The only host sync of a pass, as in transformers' own loop over experts.
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    for expert, pairs in enumerate(positions.split(counts)[:num_experts]):  # the index E means no expert
        if len(pairs):
            yield expert, pairs


def _run_expert(
    module: torch.nn.Module, slices: list[torch.Tensor], x_nH: torch.Tensor, weight_n: torch.Tensor
) -> torch.Tensor:
    """Run a shallow copy of the module that holds one expert, without copying weights."""
    copy, names = object.__new__(type(module)), [name for name, _ in module.named_parameters()]
    num_experts = len(getattr(module, names[0]))
    vars(copy).update({name: value for name, value in vars(module).items() if name != "forward"})
    vars(copy)["_parameters"] = dict(zip(names, slices, strict=True))
    count = stacked_expert_count(module)
    if count is not None and getattr(module, count) == num_experts:
        vars(copy)[count] = 1
    index_n1 = torch.zeros(len(x_nH), 1, dtype=torch.long, device=x_nH.device)
    return type(module).forward(copy, x_nH, index_n1, weight_n.unsqueeze(1))

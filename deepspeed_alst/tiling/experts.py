"""Stacked MoE experts run one by one, for mixtures whose fp32 sums of weight gradients do not fit.

Each expert gets all its tokens at once, so its weights' gradient needs no sum over tiles; an expert with more tokens
than a tile has sums for itself only. It runs the module's own forward, on a shallow copy with its slice of the weights.

Legend: T tokens, k experts per token, E experts, H hidden size, n tokens of one expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.core.hf_model_spec import stacked_expert_count
from deepspeed_alst.tiling.tiled_module import TiledModule, autocast_as_here, gradients_of
from deepspeed_alst.tiling.weight_gradients import WeightGradients


def num_stacked_experts(module: torch.nn.Module) -> int:
    """Return E if all parameters of a module are stacked by expert, some of them 3-D; else 0."""
    params, own = list(module.parameters()), list(module.parameters(recurse=False))
    shapes = [getattr(param, "ds_shape", param.shape) for param in own]
    if len(own) != len(params) or not any(len(shape) == 3 for shape in shapes):
        return 0
    counts = {shape[0] for shape in shapes}
    return counts.pop() if len(counts) == 1 else 0


def by_expert(
    work: TiledModule, tile_rows: int, x_TH: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor
) -> torch.Tensor:
    """Run a module of stacked experts, expert by expert: ``[T, H], [T, k], [T, k] -> [T, H]``.

    ``weight_Tk`` are factors of the experts' outputs; ``tile_rows`` is that of one expert's tile, at least 1.
    """
    result = _ByExpert.apply(work, tile_rows, x_TH, index_Tk, weight_Tk, *work.module.parameters())
    work.last_node = result.grad_fn
    return result


class _ByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: TiledModule,
        tile_rows: int,
        x_TH: torch.Tensor,
        index_Tk: torch.Tensor,
        weight_Tk: torch.Tensor,
        *stacks: torch.Tensor,
    ) -> torch.Tensor:
        ctx.work, ctx.tile_rows, ctx.stacks = work, tile_rows, stacks
        ctx.autocast = autocast_as_here(x_TH.device.type)
        ctx.save_for_backward(x_TH, index_Tk, weight_Tk)
        if work.is_skipped():
            return torch.full_like(x_TH, float("nan"))
        # In fp32: otherwise k rounding errors per token would add up.
        result_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
        for expert, pairs in _experts(index_Tk, len(stacks[0])):
            slices = [stack[expert : expert + 1] for stack in stacks]
            for part in pairs.split(tile_rows):
                tokens = part // index_Tk.shape[1]
                output_nH = _run(work.module, slices, x_TH[tokens], weight_Tk.flatten()[part])
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
        for expert, pairs in _experts(index_Tk, len(ctx.stacks[0])):
            slices = [
                stack.detach()[expert : expert + 1].requires_grad_(need)
                for stack, need in zip(ctx.stacks, need_stacks, strict=True)
            ]
            parts = pairs.split(ctx.tile_rows)
            sums = WeightGradients(slices, len(parts), ctx.work.fp32_accumulation)
            for part in parts:
                tokens = part // index_Tk.shape[1]
                leaves = [x_TH[tokens].requires_grad_(need_x), weight_Tk.flatten()[part].requires_grad_(need_weight)]
                with torch.enable_grad(), ctx.autocast():
                    y = _run(ctx.work.module, slices, *leaves)
                of_x, of_weight, *of_slices = gradients_of(y, (*leaves, *slices), grad_TH[tokens].to(y.dtype))
                if need_x:
                    grad_x.index_add_(0, tokens, of_x.to(grad_x))
                if need_weight:
                    grad_weight.view(-1)[part] = of_weight
                for each, gradient in zip(slices, of_slices, strict=True):
                    sums.add(each, gradient)
            for grad, of_expert in zip(grad_stacks, sums.result(), strict=True):
                if grad is not None:
                    grad[expert : expert + 1] = of_expert
        grad_x, grad_weight = grad_x.to(x_TH.dtype) if need_x else None, grad_weight if need_weight else None
        return (None, None, grad_x, None, grad_weight, *grad_stacks)


def _experts(index_Tk: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each expert that has tokens, with their places in the flattened index."""
    flat = index_Tk.flatten()
    places = flat.argsort(stable=True)
    # The only host sync of a pass; transformers' own loop over experts has it too.
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    for expert, of_expert in enumerate(places.split(counts)[:num_experts]):  # the index E marks no expert
        if len(of_expert):
            yield expert, of_expert


def _run(
    module: torch.nn.Module, slices: list[torch.Tensor], x_nH: torch.Tensor, weight_n: torch.Tensor
) -> torch.Tensor:
    """Run a shallow copy of the module that holds one expert, without copying weights."""
    shell, names = object.__new__(type(module)), [name for name, _ in module.named_parameters()]
    num_experts = len(getattr(module, names[0]))
    vars(shell).update({name: value for name, value in vars(module).items() if name != "forward"})
    vars(shell)["_parameters"] = dict(zip(names, slices, strict=True))
    count = stacked_expert_count(module)
    if count is not None and getattr(module, count) == num_experts:
        vars(shell)[count] = 1
    index_n1 = torch.zeros(len(x_nH), 1, dtype=torch.long, device=x_nH.device)
    return type(module).forward(shell, x_nH, index_n1, weight_n.unsqueeze(1))

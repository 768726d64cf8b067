"""Stacked MoE experts run one by one, for mixtures whose fp32 sums of weight gradients do not fit.

Each expert gets all its tokens at once, so its weights' gradient needs no sum over tiles; an expert with more tokens
than a tile has sums for itself only. It runs the module's own forward, on a shallow copy with its slice of the
weights.

Legend: T tokens, k experts per token, E experts, H hidden size, n tokens of one expert.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.tiling.tiled_module import TiledModule
from deepspeed_alst.tiling.tiled_pass import autocast_as_here
from deepspeed_alst.tiling.weight_gradients import WeightGradients


def num_stacked_experts(module: torch.nn.Module) -> int:
    """Return E if all parameters of a module are stacked by expert, some of them 3-D; else 0."""
    params = list(module.parameters())
    own = list(module.parameters(recurse=False))
    shapes = [getattr(param, "ds_shape", param.shape) for param in own]
    if len(own) != len(params) or not any(len(shape) == 3 for shape in shapes):
        return 0
    counts = {shape[0] for shape in shapes}
    return counts.pop() if len(counts) == 1 else 0


def by_expert(
    work: TiledModule, tile_rows: int, x_TH: torch.Tensor, index_Tk: torch.Tensor, weight_Tk: torch.Tensor
) -> torch.Tensor:
    """Run a module of stacked experts, expert by expert: ``[T, H], [T, k], [T, k] -> [T, H]``.

    Args:
        work: the module, for which ``num_stacked_experts`` is not 0.
        tile_rows: rows of one expert's tile, at least 1.
        x_TH: input tokens.
        index_Tk: experts of each token.
        weight_Tk: factors of the experts' outputs.
    """
    names = [name for name, _ in work.module.named_parameters()]
    result = _ByExpert.apply(work, tile_rows, names, x_TH, index_Tk, weight_Tk, *work.module.parameters())
    work.last_node = result.grad_fn
    return result


class _ByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: TiledModule,
        tile_rows: int,
        names: list[str],
        x_TH: torch.Tensor,
        index_Tk: torch.Tensor,
        weight_Tk: torch.Tensor,
        *stacks: torch.Tensor,
    ) -> torch.Tensor:
        ctx.work, ctx.tile_rows, ctx.names, ctx.stacks = work, tile_rows, names, stacks
        ctx.autocast = autocast_as_here(x_TH.device.type)
        ctx.save_for_backward(x_TH, index_Tk, weight_Tk)
        if work.value_unused and torch._C._current_graph_task_id() != -1:
            return torch.empty_like(x_TH)
        # In fp32: otherwise k rounding errors per token would add up.
        result_TH = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32))
        for expert, pairs in _experts(index_Tk, len(stacks[0])):
            shell = _shell(work.module, names, [stack[expert : expert + 1] for stack in stacks])
            for part in pairs.split(tile_rows):
                tokens = part // index_Tk.shape[1]
                result_TH.index_add_(0, tokens, _run(shell, x_TH[tokens], weight_Tk.flatten()[part]).to(result_TH))
        return result_TH.to(x_TH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[Any, ...]:
        x_TH, index_Tk, weight_Tk = ctx.saved_tensors
        need_x, _, need_weight, *need_stacks = ctx.needs_input_grad[3:]
        grad_x = torch.zeros_like(x_TH, dtype=torch.promote_types(x_TH.dtype, torch.float32)) if need_x else None
        grad_weight = torch.zeros_like(weight_Tk) if need_weight else None
        grad_stacks = [
            torch.zeros_like(stack) if need else None for stack, need in zip(ctx.stacks, need_stacks, strict=True)
        ]
        for expert, pairs in _experts(index_Tk, len(ctx.stacks[0])):
            slices = [
                stack.detach()[expert : expert + 1].requires_grad_(need)
                for stack, need in zip(ctx.stacks, need_stacks, strict=True)
            ]
            shell = _shell(ctx.work.module, ctx.names, slices)
            trained = [each for each in slices if each.requires_grad]
            parts = pairs.split(ctx.tile_rows)
            sums = WeightGradients(trained, len(parts), ctx.work.fp32_accumulation)
            for part in parts:
                tokens = part // index_Tk.shape[1]
                x = x_TH[tokens].requires_grad_(need_x)
                weight = weight_Tk.flatten()[part].requires_grad_(need_weight)
                with torch.enable_grad(), ctx.autocast():
                    y = _run(shell, x, weight)
                wanted = [each for each in (x, weight, *trained) if each.requires_grad]
                found = dict(
                    zip(map(id, wanted), torch.autograd.grad(y, wanted, grad_TH[tokens].to(y.dtype)), strict=True)
                )
                if need_x:
                    grad_x.index_add_(0, tokens, found[id(x)].to(grad_x))
                if need_weight:
                    grad_weight.view(-1)[part] = found[id(weight)]
                sums.add([found[id(each)] for each in trained])
            of_expert = iter(sums.result())
            for grad in grad_stacks:
                if grad is not None:
                    grad[expert : expert + 1] = next(of_expert)
        of_x = None if grad_x is None else grad_x.to(x_TH.dtype)
        return (None, None, None, of_x, None, grad_weight, *grad_stacks)


def _experts(index_Tk: torch.Tensor, num_experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each expert that has tokens, with the flat indices of its (token, expert) pairs in ``index_Tk``."""
    flat = index_Tk.flatten()
    places = flat.argsort(stable=True)
    # The only host sync of a pass; transformers' own loop over experts has it too.
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    start = 0
    for expert, count in enumerate(counts):
        # The index E marks no expert.
        if count and expert < num_experts:
            yield expert, places[start : start + count]
        start += count


def _shell(module: torch.nn.Module, names: list[str], slices: list[torch.Tensor]) -> torch.nn.Module:
    """Return a shallow copy of the module that holds one expert, without copying weights."""
    shell = object.__new__(type(module))
    num_experts = len(getattr(module, names[0]))
    vars(shell).update({name: value for name, value in vars(module).items() if name != "forward"})
    vars(shell)["_parameters"] = dict(zip(names, slices, strict=True))
    if getattr(module, "num_experts", None) == num_experts:
        vars(shell)["num_experts"] = 1
    return shell


def _run(shell: torch.nn.Module, x_nH: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    index_n1 = torch.zeros(len(x_nH), 1, dtype=torch.long, device=x_nH.device)
    return type(shell).forward(shell, x_nH, index_n1, weight_n.unsqueeze(1))

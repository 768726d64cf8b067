"""Gradients of experts that are separate modules, which not every rank calls.

transformers stacks the experts of a layer in one module. Of separate modules a forward calls those that have tokens,
which differ across ranks.
"""

from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError


def call_together(spec: ModelSpec, stage: int, leaf: Callable[[Any], None], patches: PatchSet) -> None:
    """Make blocks of separate experts look the same to the engine on all ranks, whatever their tokens.

    Under ZeRO-3 a rank that does not call an expert would not join the all-gathers of its weights, so each block is
    made a ``leaf`` module (tiling/zero3_leaf.py). On other stages the rank would have no gradient for the expert, or at
    another time, and DeepSpeed 0.19.8 then adds up gradients of different weights.
    """
    for block, experts in spec.separate_experts():
        if stage == 3:
            leaf(block)
        else:
            patches.hook(block, "forward_pre", _gradient_for_each(experts))


class _ZeroGradients(torch.autograd.Function):
    """Identity of a block's input that gives the weights of all its experts a zero gradient.

    Its backward runs after those of all ops on the input, so every weight's gradient is complete then on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.params = params
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # An expanded scalar takes memory only for weights without another gradient.
        return grad, *(param.new_zeros(()).expand_as(param) for param in ctx.params)


def _gradient_for_each(experts: torch.nn.Module) -> Callable[..., Any]:
    @torch.compiler.disable
    def hook(block: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        params = [param for param in experts.parameters() if param.requires_grad]
        if not params or not torch.is_grad_enabled():
            return None
        if not args or not isinstance(args[0], torch.Tensor):
            raise UnsupportedModelError(
                f"{type(block).__name__} has experts of their own and was not called with its tokens first: those "
                "without tokens could not be given a gradient. Use ZeRO 3."
            )
        return (_ZeroGradients.apply(args[0], *params), *args[1:])

    return hook

"""Mixture-of-experts support: modules with router logits, and gradients of separate experts.

transformers stacks the experts of a layer in one module. Of separate modules a forward calls those that have tokens,
which differ across ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.errors import UnsupportedModelError


def router_classes(model: torch.nn.Module) -> tuple[type, ...]:
    """Return the module classes whose router logits a model, bare or wrapped, can return; may be empty."""
    models = [module for module in base_model(model).modules() if isinstance(module, PreTrainedModel)]
    specs = [(each._can_record_outputs or {}).get("router_logits") for each in models]
    flat = [each for spec in specs for each in (spec if isinstance(spec, list) else [spec])]
    classes = [each.target_class if isinstance(each, OutputRecorder) else each for each in flat]
    return tuple(dict.fromkeys(each for each in classes if isinstance(each, type)))


def call_together(model: torch.nn.Module, stage: int, leaf: Callable[[Any], None], patches: PatchSet) -> None:
    """Make blocks of separate experts look the same to the engine on all ranks, whatever their tokens.

    Under ZeRO-3 a rank that does not call an expert would not join the all-gathers of its weights, so each block is
    made a ``leaf`` module (tiling/zero3_leaf.py). On other stages the rank would have no gradient for the expert, or at
    another time, and DeepSpeed 0.19.8 then adds up gradients of different weights.
    """
    for block, experts in separate_experts(base_model(model)):
        if stage == 3:
            leaf(block)
        else:
            patches.hook(block, "forward_pre", _gradient_for_each(experts))


def expert_counts(base: torch.nn.Module) -> set[int]:
    """Return the possible numbers of experts in a block, from the model's config."""
    config = vars(base.config.get_text_config()) if isinstance(base, PreTrainedModel) else {}
    sizes = [value for name, value in config.items() if name.endswith("experts") and "shared" not in name]
    return {size for size in sizes if isinstance(size, int) and size > 1}


def separate_experts(base: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Yield the decoder-layer blocks that hold a list of as many modules as the config has experts, and the list."""
    counts = expert_counts(base)
    layers = [layer for module in base.modules() if isinstance(module, torch.nn.ModuleList) for layer in module]
    # Nested lists yield their blocks twice.
    for block in dict.fromkeys(block for layer in layers for block in layer.modules()):
        for child in block.children():
            if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict) and len(child) in counts:
                yield block, child


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

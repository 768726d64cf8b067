"""What the package must know of a mixture of experts: what it records of its routers, and how it holds its experts.

transformers stacks the experts of a layer in one module, which every token passes. In a mixture whose experts are
modules of their own, a forward calls those that have tokens, and on shards these differ from rank to rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.models.wrapped import base_model


def router_classes(model: torch.nn.Module) -> tuple[type, ...]:
    """The classes of modules whose router logits a model, bare or wrapped, can return; empty if it has none."""
    models = [module for module in base_model(model).modules() if isinstance(module, PreTrainedModel)]
    specs = [(each._can_record_outputs or {}).get("router_logits") for each in models]
    flat = [each for spec in specs for each in (spec if isinstance(spec, list) else [spec])]
    classes = [each.target_class if isinstance(each, OutputRecorder) else each for each in flat]
    return tuple(dict.fromkeys(each for each in classes if isinstance(each, type)))


def call_together(model: torch.nn.Module, stage: int, leaf: Callable[[Any], None], patches: PatchSet) -> None:
    """Make blocks of separate experts the same to the engine on ranks whose tokens go to different ones.

    Under ZeRO-3 a rank that does not call an expert would not join the gathers of its weights; on the other stages it
    would have no gradient for it, or have it at another time, and DeepSpeed 0.19.8 then adds up those of different
    weights. With or without sequence parallelism.

    Args:
        model: a transformers model, or a wrapper around one.
        stage: of ZeRO.
        leaf: called with each block under ZeRO-3: the engine is to gather its weights as one (engine/leaves.py).
        patches: takes it back.
    """
    for block, experts in _separate_experts(base_model(model)):
        if stage == 3:
            leaf(block)
        else:
            patches.hook(block, "forward_pre", _gradient_for_each(experts))


def expert_counts(base: torch.nn.Module) -> set[int]:
    """How many experts a block of a model may have, as its config has it."""
    config = vars(base.config.get_text_config()) if isinstance(base, PreTrainedModel) else {}
    sizes = [value for name, value in config.items() if name.endswith("experts") and "shared" not in name]
    return {size for size in sizes if isinstance(size, int) and size > 1}


def _separate_experts(base: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
    """Blocks in decoder layers with a list of as many modules as the config has experts, and that list."""
    counts = expert_counts(base)
    layers = [layer for module in base.modules() if isinstance(module, torch.nn.ModuleList) for layer in module]
    # A list in a list is come upon twice.
    for block in dict.fromkeys(block for layer in layers for block in layer.modules()):
        for child in block.children():
            if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict) and len(child) in counts:
                yield block, child


class _ZeroGradients(torch.autograd.Function):
    """A block's input as it is, from which the weights of all its experts get a gradient of zeros.

    Its backward comes after that of all that is made of the input, so every weight's gradient is there at this moment:
    in one order, the same on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.params = params
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # One zero that is seen everywhere: memory is taken only for weights without another gradient.
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

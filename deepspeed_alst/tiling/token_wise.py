"""Token-wise modules of a model: MLPs and experts, found by structure instead of by name."""

import inspect
from collections.abc import Iterator

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec

# Arguments of a forward that depends on other tokens or on a token's position.
_NOT_TOKEN_WISE = {"attention_mask", "position_ids", "position_embeddings", "past_key_values", "layer_past", "cache"}
_MAX_ARGUMENTS = 3


def token_wise_modules(spec: ModelSpec) -> dict[str, torch.nn.Module]:
    """Return the innermost token-wise modules with matrices in a model's decoder layers, by name.

    A mixture's experts are included, but not its router, whose recorded logits must cover all tokens.
    """
    routers = spec.router_classes
    return {
        name: module
        for path, layer in spec.layers.items()
        for name, module in _innermost(path, layer)
        if not any(isinstance(each, routers) for each in module.modules())
    }


def output_features(module: torch.nn.Module, experts_per_token: int) -> int:
    """Return the total output features of the matrices that a token passes in a module, stacked experts included."""
    dense = sum(shape[0] for shape in _matrices(module) if len(shape) == 2)
    # Stacked experts store their matrices in either orientation.
    stacked = sum(max(shape[1:]) for shape in _matrices(module) if len(shape) == 3)
    return dense + stacked * experts_per_token


def _innermost(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the innermost token-wise descendants with at least two matrices."""
    for inner, child in module.named_children():
        path = f"{name}.{inner}"
        if not _matrices(child) or _NOT_TOKEN_WISE & set(inspect.signature(child.forward).parameters):
            continue
        is_stack = any(param.dim() == 3 for param in child.parameters(recurse=False))
        if found := [] if is_stack else list(_innermost(path, child)):
            yield from found
        elif len(_matrices(child)) > 1 and _is_token_wise(child):
            yield path, child


def _matrices(module: torch.nn.Module) -> list[torch.Size]:
    """Return the shapes of a module's weights with two or more dims, submodules included."""
    shapes = [getattr(param, "ds_shape", param.shape) for param in module.parameters()]  # ds_shape: ZeRO-3's
    return [shape for shape in shapes if len(shape) > 1]


def _is_token_wise(module: torch.nn.Module) -> bool:
    """Return True if a forward takes one to three tensors and nothing else, and uses the module's matrices."""
    if isinstance(module, torch.nn.Linear):
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    if len(parameters) == 1 and any(param.dim() == 3 for param in module.parameters(recurse=False)):
        return False  # Llama 4's experts, whose rows are sorted by expert
    are_named = all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
    forwards = [inspect.unwrap(vars(cls)["forward"]) for cls in type(module).__mro__ if "forward" in vars(cls)]
    used = {name for forward in forwards for name in forward.__code__.co_names}
    # Gemma3n's AltUp has matrices that other methods use, which would find them partitioned under ZeRO-3.
    uses_all = all(name in used for name, child in module.named_children() if _matrices(child))
    is_sequential = isinstance(module, torch.nn.Sequential)
    return are_named and 1 <= len(parameters) <= _MAX_ARGUMENTS and (uses_all or is_sequential)

"""Token-wise modules of a model that are worth tiling: MLPs and experts, dense or mixed.

transformers' tensor-parallel plan tells where a decoder layer's matrices are; a model without a plan, or a layer that
the plan omits, is searched by structure. Modules are not matched by name.
"""

import fnmatch
import inspect
from collections.abc import Iterator

import torch

from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.moe.hf_experts import router_classes

# Arguments of a forward that depends on other tokens or on a token's position.
_NOT_TOKEN_WISE = {"attention_mask", "position_ids", "position_embeddings", "past_key_values", "layer_past", "cache"}
_ROW_ARGUMENTS = 3


def token_wise_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the innermost token-wise modules with matrices in a model's decoder layers, by name.

    A mixture's experts are included, its router is not: what a block records of it stays outside the tiles.
    """
    base = base_model(model)
    routers = router_classes(base)
    decoder = getattr(base, "base_model", base)
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    found: dict[str, torch.nn.Module] = {}
    for name, layer in _layers(decoder):
        of_layer = dict(_by_table(decoder, name, layer)) or dict(_by_structure(name, layer))
        of_layer = {inner: module for inner, module in of_layer.items() if not _contains(module, routers)}
        found |= {f"{prefix}.{inner}".lstrip("."): module for inner, module in of_layer.items()}
    return found


def layer_of(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return the decoder layer that contains a module found here."""
    parts = name.split(".")
    base = base_model(model)
    for length in range(1, len(parts)):
        if isinstance(base.get_submodule(".".join(parts[:length])), torch.nn.ModuleList):
            return base.get_submodule(".".join(parts[: length + 1]))
    raise LookupError(f"{name} is in no ModuleList")


def output_features(module: torch.nn.Module, experts_per_token: int) -> int:
    """Return the output features of all matrices that a token passes in a module, its stacked experts included."""
    dense = sum(shape[0] for shape in _matrices(module) if len(shape) == 2)
    # Stacked experts store their matrices in either orientation.
    stacked = sum(max(shape[1:]) for shape in _matrices(module) if len(shape) == 3)
    return dense + stacked * experts_per_token


def _layers(decoder: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the elements of the decoder's own ModuleLists."""
    for name, child in decoder.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(child))


def _by_table(decoder: torch.nn.Module, name: str, layer: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield stacked experts and modules that take rows and have a row-wise sharded matrix, as an MLP does."""
    table = getattr(getattr(decoder, "config", None), "base_model_tp_plan", None) or {}
    for inner, module in layer.named_modules(prefix=name):
        ends = [
            pattern.rsplit(".", 1)[1]
            for pattern, style in table.items()
            if style.startswith("rowwise") and fnmatch.fnmatchcase(inner, pattern.rsplit(".", 1)[0])
        ]
        if any(hasattr(module, end) for end in ends) and _takes_rows(module):
            yield inner, module


def _by_structure(name: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the innermost descendants that take rows and have at least two matrices."""
    for inner, child in module.named_children():
        path = f"{name}.{inner}"
        if not any(True for _ in _matrices(child)) or _looks_elsewhere(child):
            continue
        own_stack = any(param.dim() == 3 for param in child.parameters(recurse=False))
        inside = [] if own_stack else list(_by_structure(path, child))
        if inside:
            yield from inside
        elif len(list(_matrices(child))) > 1 and _takes_rows(child):
            yield path, child


def _contains(module: torch.nn.Module, classes: tuple[type, ...]) -> bool:
    return any(isinstance(inner, classes) for inner in module.modules())


def _matrices(module: torch.nn.Module) -> Iterator[torch.Size]:
    """Yield the shapes of a module's weights, submodules included, without vectors."""
    for param in module.parameters():
        shape = getattr(param, "ds_shape", param.shape)  # of a weight partitioned by ZeRO-3
        if len(shape) > 1:
            yield shape


def _looks_elsewhere(module: torch.nn.Module) -> bool:
    return bool(_NOT_TOKEN_WISE & set(inspect.signature(module.forward).parameters))


def _takes_rows(module: torch.nn.Module) -> bool:
    """Return True if a forward takes one to three tensors and nothing else."""
    if isinstance(module, torch.nn.Linear | torch.nn.ModuleList) or _looks_elsewhere(module):
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    plain = all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
    return plain and 1 <= len(parameters) <= _ROW_ARGUMENTS

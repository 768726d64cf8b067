"""Which modules of a model are token-wise and worth running in tiles: MLPs and experts, dense or mixed.

transformers' own tensor-parallel tables say where a decoder layer's matrices are; a model without one, or a layer that
it says nothing of, is searched by structure. No module is known by its name.
"""

import fnmatch
import inspect
from collections.abc import Iterator

import torch

from deepspeed_alst.models.experts import router_classes
from deepspeed_alst.models.wrapped import base_model

# Arguments of a forward that looks at other tokens, or at where a token stands.
_NOT_TOKEN_WISE = {"attention_mask", "position_ids", "position_embeddings", "past_key_values", "layer_past", "cache"}
_ROW_ARGUMENTS = 3


def token_wise_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The innermost token-wise modules with matrices in a model's decoder layers, by their names in it.

    A mixture's experts are among them, its router is not: what a block records of it stays outside of the tiles.
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
    """The decoder layer that a module found here is part of."""
    parts = name.split(".")
    base = base_model(model)
    for length in range(1, len(parts)):
        if isinstance(base.get_submodule(".".join(parts[:length])), torch.nn.ModuleList):
            return base.get_submodule(".".join(parts[: length + 1]))
    raise LookupError(f"{name} is in no ModuleList")


def output_features(module: torch.nn.Module, experts_per_token: int) -> int:
    """Outputs of all matrices that a token passes in a module; of stacked experts, those that it is sent to."""
    dense = sum(shape[0] for shape in _matrices(module) if len(shape) == 2)
    # Stacked experts keep their matrices either way round.
    stacked = sum(max(shape[1:]) for shape in _matrices(module) if len(shape) == 3)
    return dense + stacked * experts_per_token


def _layers(decoder: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The elements of the decoder's own lists of modules."""
    for name, child in decoder.named_children():
        if isinstance(child, torch.nn.ModuleList):
            yield from ((f"{name}.{index}", layer) for index, layer in enumerate(child))


def _by_table(decoder: torch.nn.Module, name: str, layer: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules with a row-wise split matrix, which ends an MLP as it ends an attention, and stacked experts."""
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
    """Descendants with two matrices or more that take rows, the innermost ones that hold matrices of their own."""
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
    """Shapes of a module's weights, those of its submodules included, but for vectors."""
    for param in module.parameters():
        shape = getattr(param, "ds_shape", param.shape)  # of a weight that ZeRO-3 has partitioned
        if len(shape) > 1:
            yield shape


def _looks_elsewhere(module: torch.nn.Module) -> bool:
    return bool(_NOT_TOKEN_WISE & set(inspect.signature(module.forward).parameters))


def _takes_rows(module: torch.nn.Module) -> bool:
    """Whether a forward takes a few tensors and nothing else."""
    if isinstance(module, torch.nn.Linear | torch.nn.ModuleList) or _looks_elsewhere(module):
        return False
    parameters = inspect.signature(module.forward).parameters.values()
    plain = all(each.kind is each.POSITIONAL_OR_KEYWORD for each in parameters)
    return plain and 1 <= len(parameters) <= _ROW_ARGUMENTS

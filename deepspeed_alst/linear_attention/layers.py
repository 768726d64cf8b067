"""Token-mixing layers without attention: gated delta nets, Mamba, short convolutions.

They are found by the functions with kernels that their methods call. A layer whose functions are all known can be
sharded (split_layers.py); others are rejected.
"""

import inspect
import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec

Function = Callable[..., Any]


@dataclass(frozen=True)
class Kind:
    """Properties of a token-mixing function."""

    keeps_documents_apart: bool = True
    """True if transformers' layers pass it the bounds of packed documents."""
    heads: tuple[str, ...] = ()
    """Candidate attributes of a layer for its number of heads; the first present one counts."""
    groups: tuple[str, ...] = ()
    """Candidate attributes for the number of heads that several heads share; empty if all share one."""


_DELTA = {"heads": ("num_v_heads", "num_heads"), "groups": ("num_k_heads", "num_heads")}
KINDS = {
    "causal_conv1d_fn": Kind(),
    "torch_chunk_gated_delta_rule": Kind(**_DELTA),
    "chunk_kimi_delta_attention": Kind(keeps_documents_apart=False, **_DELTA),
    "mamba2_chunk_scan": Kind(heads=("num_heads",), groups=("n_groups",)),
    "mamba2_split_conv1d_scan_combined": Kind(),
    "mamba_selective_scan": Kind(keeps_documents_apart=False, heads=("mamba_head_dim", "intermediate_size")),
    "mamba_inner_fn": Kind(),
}
"""Functions by their names in transformers' layers."""
# Single-token generation with a cache, which is never sharded.
_FOR_GENERATION = {
    "causal_conv1d_update",
    "torch_recurrent_gated_delta_rule",
    "recurrent_kimi_delta_attention",
    "mamba2_selective_state_update",
    "mamba_selective_state_update",
}
# Values of a config's layer_types: layers that may be shardable, and token-wise ones.
_MAY_BE_SPLIT = ("linear_attention", "conv", "hybrid")
_TOKEN_WISE = {"mlp", "moe"}


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return a model's token-mixing layers without attention, by name."""
    mixing = {each: bool(functions_of(each)) for each in {type(module) for module in model.modules()}}
    return {name: module for name, module in model.named_modules() if mixing[type(module)]}


def functions_of(layer: type) -> dict[str, Function]:
    """Return the functions with kernels that a layer's methods call, by name."""
    return {name: function for method in _methods(layer) for name, function in _called_by(method).items()}


def kernel_wrapper(value: Any) -> Any:
    """Return transformers' function that runs a kernel or its plain torch fallback; None for any other value.

    With the ``kernels`` package the function is inside a module.
    """
    if isinstance(value, torch.nn.Module) and hasattr(value, "kernel_layer_name"):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    known = inspect.isfunction(value) and "is_new_implementation" in value.__code__.co_freevars
    return value if known else None


def _methods(layer: type) -> Iterator[types.FunctionType]:
    for each in itertools.takewhile(lambda each: each is not torch.nn.Module, layer.__mro__):
        yield from (inspect.unwrap(method) for method in vars(each).values() if inspect.isfunction(method))


def _called_by(method: types.FunctionType) -> dict[str, Function]:
    found = {name: method.__globals__.get(name) for name in _names_in(method.__code__)}
    return {name: value for name, value in found.items() if kernel_wrapper(value) is not None}


def _names_in(code: types.CodeType) -> set[str]:
    """Return the names that a code object looks up, comprehensions and inner functions included."""
    inner = (_names_in(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*inner)


def linear_problems(model: torch.nn.Module) -> list[str]:
    """Return why layers of a model cannot be sharded, one line per layer class."""
    problems: dict[type, str] = {}
    for name, layer in linear_layers(model).items():
        unknown = sorted(functions_of(type(layer)).keys() - KINDS.keys() - _FOR_GENERATION)
        others = set(_methods(type(layer))) - {inspect.unwrap(type(layer).forward)}
        elsewhere = sorted({each for method in others for each in _called_by(method)})
        if unknown or elsewhere:
            where = "" if unknown else " outside of its forward"
            why = f"calls {', '.join(unknown or elsewhere)}{where}, which is not verified on a split sequence"
        elif "forward" in vars(layer):
            why = "has a forward that was set on the instance; remove it"
        else:
            continue
        problems.setdefault(type(layer), f"{name} ({type(layer).__name__}) {why}")
    return list(problems.values())


def available_layer_types(model: torch.nn.Module, layer_types: list[str] | None) -> set[str]:
    """Return a config's layer types, attention aside, that sequence parallelism supports.

    Each layer of such a type contains a token-mixing layer; ``linear_problems`` lists those that cannot be sharded.
    """
    layer_types = layer_types or []
    split = set(linear_layers(model).values())
    lists = (each for each in ModelSpec(model).module_lists if len(each) == len(layer_types))
    stacks = [list(zip(layer_types, each, strict=True)) for each in lists]
    return _TOKEN_WISE | {
        each
        for each in _MAY_BE_SPLIT
        if any(all(split & set(layer.modules()) for its, layer in stack if its == each) for stack in stacks)
    }


def has_attention(model: torch.nn.Module) -> bool:
    """Return True if any layer of a transformers model attends, according to its config."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    return not layer_types or set(layer_types) != {"linear_attention"}


def linear_heads(model: torch.nn.Module) -> set[tuple[int, int]]:
    """Return the numbers of heads, or channels, that a model's scans shard, and of their keys or B and C."""
    return {found for layer in linear_layers(model).values() for found in _heads_of(layer)}


def _heads_of(layer: torch.nn.Module) -> Iterator[tuple[int, int]]:
    for name in functions_of(type(layer)).keys() & KINDS.keys():
        kind = KINDS[name]
        heads = next((getattr(layer, each) for each in kind.heads if hasattr(layer, each)), None)
        if heads is not None:
            yield heads, next((getattr(layer, each) for each in kind.groups if hasattr(layer, each)), 1)

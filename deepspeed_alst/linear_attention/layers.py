"""Token-mixing layers without attention: gated delta nets, Mamba, short convolutions.

They are found by the kernel functions that their methods call. A layer whose functions are all known can be sharded
(sharded_layers.py); others are rejected.
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
class TokenMixer:
    """Properties of a token-mixing function."""

    supports_packing: bool = True
    """True if transformers' layers pass the function the bounds of packed documents."""
    heads: tuple[str, ...] = ()
    """Attributes of a layer that may hold its number of heads; the first present one counts."""
    groups: tuple[str, ...] = ()
    """Attributes that may hold its number of head groups; empty for one group."""


_DELTA = {"heads": ("num_v_heads", "num_heads"), "groups": ("num_k_heads", "num_heads")}
TOKEN_MIXERS = {
    "causal_conv1d_fn": TokenMixer(),
    "torch_chunk_gated_delta_rule": TokenMixer(**_DELTA),
    "chunk_kimi_delta_attention": TokenMixer(supports_packing=False, **_DELTA),
    "mamba2_chunk_scan": TokenMixer(heads=("num_heads",), groups=("n_groups",)),
    "mamba2_split_conv1d_scan_combined": TokenMixer(),
    "mamba_selective_scan": TokenMixer(supports_packing=False, heads=("mamba_head_dim", "intermediate_size")),
    "mamba_inner_fn": TokenMixer(),
}
"""Token-mixing functions by name in transformers' layers."""
# Generation with a cache is never sharded.
_FOR_GENERATION = {
    "causal_conv1d_update",
    "torch_recurrent_gated_delta_rule",
    "recurrent_kimi_delta_attention",
    "mamba2_selective_state_update",
    "mamba_selective_state_update",
}
# Values of a config's layer_types: possibly shardable layers, and token-wise ones.
_SHARDABLE = ("linear_attention", "conv", "hybrid")
_TOKEN_WISE = {"mlp", "moe"}


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return a model's token-mixing layers without attention, by name."""
    is_mixing = {cls: bool(mixing_functions(cls)) for cls in {type(module) for module in model.modules()}}
    return {name: module for name, module in model.named_modules() if is_mixing[type(module)]}


def mixing_functions(layer: type) -> dict[str, Function]:
    """Return the kernel functions that a layer's methods call, by name."""
    return {name: function for method in _methods(layer) for name, function in _kernel_functions(method).items()}


def kernel_wrapper(value: Any) -> Any:
    """Return transformers' wrapper of a kernel and its torch fallback; None for any other value.

    With the ``kernels`` package the wrapper is inside a module.
    """
    if isinstance(value, torch.nn.Module) and hasattr(value, "kernel_layer_name"):
        value = inspect.getclosurevars(type(value).forward).nonlocals.get("func")
    known = inspect.isfunction(value) and "is_new_implementation" in value.__code__.co_freevars
    return value if known else None


def _methods(layer: type) -> Iterator[types.FunctionType]:
    for each in itertools.takewhile(lambda each: each is not torch.nn.Module, layer.__mro__):
        yield from (inspect.unwrap(method) for method in vars(each).values() if inspect.isfunction(method))


def _kernel_functions(method: types.FunctionType) -> dict[str, Function]:
    found = {name: method.__globals__.get(name) for name in _global_names(method.__code__)}
    return {name: value for name, value in found.items() if kernel_wrapper(value) is not None}


def _global_names(code: types.CodeType) -> set[str]:
    """Return the global names that a code object looks up, comprehensions and inner functions included."""
    inner = (_global_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*inner)


def unsupported_linear_layers(model: torch.nn.Module) -> list[str]:
    """Return the reasons why layers cannot be sharded, one per layer class."""
    reasons: dict[type, str] = {}
    for name, layer in linear_layers(model).items():
        unknown = sorted(mixing_functions(type(layer)).keys() - TOKEN_MIXERS.keys() - _FOR_GENERATION)
        others = set(_methods(type(layer))) - {inspect.unwrap(type(layer).forward)}
        elsewhere = sorted({each for method in others for each in _kernel_functions(method)})
        if unknown or elsewhere:
            where = "" if unknown else " outside of its forward"
            reason = f"calls {', '.join(unknown or elsewhere)}{where}, which is not verified on a sharded sequence"
        elif "forward" in vars(layer):
            reason = "has a forward that was set on the instance; remove it"
        else:
            continue
        reasons.setdefault(type(layer), f"{name} ({type(layer).__name__}) {reason}")
    return list(reasons.values())


def available_layer_types(model: torch.nn.Module, layer_types: list[str] | None) -> set[str]:
    """Return a config's layer types, attention aside, whose layers are token-wise or all contain a token-mixing layer.

    ``unsupported_linear_layers`` lists those that still cannot be sharded.
    """
    layer_types = layer_types or []
    linear = set(linear_layers(model).values())
    lists = (each for each in ModelSpec(model).module_lists if len(each) == len(layer_types))
    stacks = [list(zip(layer_types, each, strict=True)) for each in lists]
    return _TOKEN_WISE | {
        each
        for each in _SHARDABLE
        if any(all(linear & set(layer.modules()) for its, layer in stack if its == each) for stack in stacks)
    }


def has_attention(model: torch.nn.Module) -> bool:
    """Return True if any layer of a transformers model attends, according to its config."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    return not layer_types or set(layer_types) != {"linear_attention"}


def linear_heads(model: torch.nn.Module) -> set[tuple[int, int]]:
    """Return the numbers of heads (or channels) and of head groups of a model's scans."""
    return {found for layer in linear_layers(model).values() for found in _heads_of(layer)}


def _heads_of(layer: torch.nn.Module) -> Iterator[tuple[int, int]]:
    for name in mixing_functions(type(layer)).keys() & TOKEN_MIXERS.keys():
        kind = TOKEN_MIXERS[name]
        heads = next((getattr(layer, each) for each in kind.heads if hasattr(layer, each)), None)
        if heads is not None:
            yield heads, next((getattr(layer, each) for each in kind.groups if hasattr(layer, each)), 1)

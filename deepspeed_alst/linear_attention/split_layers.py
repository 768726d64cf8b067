"""Run a layer's own forward with its token-mixing functions replaced by sharded ones."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.function_copies import with_names
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.linear_attention.functions import SHARDED, Split
from deepspeed_alst.linear_attention.layers import KINDS, functions_of, linear_layers
from deepspeed_alst.sequence_parallel.forward_context import CACHES, ForwardContext


def split_linear_layers(model: torch.nn.Module, group: Any, calls: ForwardContext, patches: PatchSet) -> int:
    """Shard the layers without attention of a model without ``linear_problems`` over a group; return their number."""
    layers = list(linear_layers(model).values())
    split, owned = Split(group), weakref.WeakSet(layers)
    forwards = {each: _split_forward(each, split, calls, owned) for each in {type(layer) for layer in layers}}
    for layer in layers:
        # A method, so that a deep copy of the layer binds its own, which raises.
        patches.forward(layer, forwards[type(layer)])
    return len(layers)


def _split_forward(
    layer: type[torch.nn.Module], split: Split, calls: ForwardContext, owned: weakref.WeakSet[torch.nn.Module]
) -> Callable[..., Any]:
    plain = inspect.unwrap(layer.forward)
    known = {name: function for name, function in functions_of(layer).items() if name in KINDS}
    replaced = {name: SHARDED[name](function, split) for name, function in known.items()}
    # The layer's own code looks the functions up in the globals of its source file.
    run = with_names(plain, lambda function: replaced if function is plain else {})
    signature = inspect.signature(plain)
    leaking = [name for name in known if not KINDS[name].keeps_documents_apart]

    # Collectives and checks stay out of compiled graphs, which would also read the source file's own globals.
    @torch.compiler.disable
    @functools.wraps(layer.forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if calls.whole:
            return layer.forward(self, *args, **kwargs)
        if self not in owned:
            raise UnsupportedModelError(
                f"{layer.__name__} is a copy of one in a model under sequence parallelism: it would mix the sequences "
                "of all ranks. Copy the model before deepspeed.initialize, or build it from copy.deepcopy(model.config)"
            )
        bounds = kwargs.get("cu_seq_lens_q")
        calls.enter(layer.__name__, has_documents=bounds is not None)
        _check_arguments(layer.__name__, signature.bind(self, *args, **kwargs).arguments)
        if bounds is not None:
            _check_documents(layer.__name__, leaking, kwargs)
        with split.documents(bounds):
            return run(self, *args, **kwargs)

    return forward


def _check_arguments(layer: str, arguments: dict[str, Any]) -> None:
    if arguments.get("attention_mask") is not None:
        shape = list(arguments["attention_mask"].shape)
        raise UnsupportedModelError(f"{layer} was given a mask of shape {shape}: not verified on a split sequence")
    caches = [name for name in CACHES if arguments.get(name, arguments.get("kwargs", {}).get(name)) is not None]
    if caches:
        raise UnsupportedModelError(
            f"{layer} was given {caches[0]}: generation with a cache is not yet available under sequence parallelism"
        )


def _check_documents(layer: str, leaking: list[str], kwargs: dict[str, Any]) -> None:
    """Raise on packed documents if transformers carries one's state into the next."""
    if leaking:
        raise UnsupportedModelError(
            f"packed documents would see one another in {layer}: transformers does not tell its {leaking[0]} where "
            "they end. Give the model one document per row"
        )
    if kwargs.get("seq_idx") is None:
        raise UnsupportedModelError(
            f"packed documents without seq_idx: without sequence parallelism they would see one another in {layer}. "
            "Add it to the batch, [batch, sequence], the number of each token's document "
            "(DataCollatorWithFlattening(return_seq_idx=True)), or give the model one document per row"
        )

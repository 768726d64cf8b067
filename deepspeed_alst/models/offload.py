"""The tensors of a transformers model's checkpointed layers that wait for the backward, and where they wait.

Each checkpointed layer's input is moved off the device when the layer begins, and comes back when it is run again; so
is attention's output, if it is kept. What is to wait is known from the batch's shape, so whether there is room for it
is decided before the forward, by all ranks from the same facts.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.models.checkpoints import Checkpoint, checkpointed_layers, seam_of
from deepspeed_alst.models.wrapped import base_model
from deepspeed_alst.offload.frames import Frame, on_device
from deepspeed_alst.offload.store import Store


@dataclass(eq=False)
class Keeping:
    """What is kept of a model's checkpointed layers, where.

    Args:
        store: where it waits; None: on the device.
        keep_last: layers at the end whose tensors stay on the device.
    """

    store: Store | None
    keep_last: int = 0
    must_keep_attention: bool = False
    """Whether an attention whose output cannot be kept is an error, and not said once."""
    keeps_attention: bool = False
    """Whether attention's output is kept in the forward that comes."""
    _unkept: set[str] = field(default_factory=set)

    def check(self, layer: torch.nn.Module, frame: Frame) -> None:
        """See what attention of a layer's forward was not kept.

        Raises:
            UnsupportedModelError: there is some, and it must be.
        """
        for words in frame.unkept_attention:
            sentence = f"attention of {type(layer).__name__} ran as {words}, whose output cannot be kept"
            if self.must_keep_attention:
                raise UnsupportedModelError(
                    f"alst.save_attention_output: {sentence}. Load the model with attn_implementation='sdpa' or "
                    "'flash_attention_2', or set the key to false."
                )
            if words not in self._unkept:
                self._unkept.add(words)
                warnings.warn(f"alst.save_attention_output: {sentence}; it runs again in the backward", stacklevel=2)


def keep_activations(model: torch.nn.Module, keeping: Keeping, undo: ExitStack) -> None:
    """Have each checkpointed layer of a model keep what is to be kept; ``undo.close()`` takes it back.

    Raises:
        UnsupportedModelError: transformers checkpoints no layer of it one by one.
    """
    layers = checkpointed_layers(model)
    if not layers:
        raise UnsupportedModelError(
            f"alst.activation_checkpoint_cpu_offload: {type(base_model(model)).__name__} has no layers that "
            "transformers checkpoints one by one (GradientCheckpointingLayer). Set the key to false."
        )
    given_before: list[Any] = []
    for index, layer in enumerate(layers):
        stays = index >= len(layers) - keeping.keep_last
        seam_of(layer, undo).around.append(functools.partial(_around, layer, keeping, stays, given_before))


def turn_on_checkpointing(model: torch.nn.Module, undo: ExitStack) -> bool:
    """Turn gradient checkpointing on, by transformers' own way, unless it is; whether it was off.

    ``undo.close()`` turns it off again.

    Raises:
        UnsupportedModelError: the model cannot.
    """
    base = base_model(model)
    if base.is_activation_checkpointing:
        return False
    if not base.supports_gradient_checkpointing:
        raise UnsupportedModelError(
            f"alst.activation_checkpoint_cpu_offload: {type(base).__name__} does not support gradient checkpointing. "
            "Set the key to false."
        )
    base.activation_checkpointing_enable()
    undo.callback(base.disable_input_require_grads)
    undo.callback(base.activation_checkpointing_disable)
    return True


def check_checkpointing(model: torch.nn.Module, key: str) -> None:
    """Make sure, in training, that layers are checkpointed, and by nobody else's offload.

    Raises:
        UnsupportedModelError: the key could not act.
    """
    layers = [layer for layer in checkpointed_layers(model) if layer.gradient_checkpointing]
    if not layers:
        raise UnsupportedModelError(
            f"{key}: no layer of {type(base_model(model)).__name__} is checkpointed. Turn gradient checkpointing on "
            "(model.gradient_checkpointing_enable()), or set the key to false."
        )
    function = vars(layers[0]).get("_gradient_checkpointing_func")
    function = getattr(function, "alst_before", function)
    if "_activation_checkpointing_enable" in getattr(getattr(function, "func", None), "__qualname__", ""):
        raise UnsupportedModelError(
            f"{key}: gradient checkpointing was turned on with transformers' own offload, which would copy what this "
            "package copies. Leave offload out of gradient_checkpointing_kwargs, or set the key to false."
        )


def _around(
    layer: torch.nn.Module, keeping: Keeping, stays: bool, given_before: list[Any], checkpoint: Checkpoint
) -> Checkpoint:
    """A checkpoint that is a frame, and whose inputs wait in its group of the store."""
    first = list(inspect.signature(type(layer).forward).parameters)[1]  # after self

    @torch.compiler.disable(recursive=False)
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        function, args = _as_positional(function, args, first)
        if keeping.store is None or not args:
            frame = Frame(on_device, keeping.keeps_attention)
            output = checkpoint(_in_frame(frame, function), *args, **kwargs)
            keeping.check(layer, frame)
            return output
        group = keeping.store.group(stays)
        frame = Frame(group.put, keeping.keeps_attention)
        # Detached and not what a hook is given: that has no count of changes in place.
        streams = {
            _storage(each): each.detach()
            for index, each in enumerate(args)
            if _is_stream(each) and (index == 0 or each.requires_grad)
        }
        # What several layers are given, such as the embeddings beside the stream, stays on the device for them.
        first_key = _storage(args[0]) if isinstance(args[0], torch.Tensor) else None
        leaving = {key: each for key, each in streams.items() if key == first_key or key not in given_before}
        given_before[:] = streams

        def pack(tensor: torch.Tensor) -> Any:
            stream = leaving.get(_storage(tensor))
            return tensor if stream is None or stream.shape != tensor.shape else group.put(stream)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
                output = checkpoint(_in_frame(frame, function), *args, **kwargs)
        finally:
            streams.clear()
            leaving.clear()
        keeping.check(layer, frame)
        return output

    return call


def _unpack(packed: Any) -> torch.Tensor:
    return packed if isinstance(packed, torch.Tensor) else packed()


def _in_frame(frame: Frame, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with frame.running():
            return function(*args, **kwargs)

    return run


def _as_positional(
    function: Callable[..., Any], args: tuple[Any, ...], first: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The same call with the layer's streams among the positional arguments, which a checkpoint saves; the first first.

    transformers has bound keyword arguments to the function already.
    """
    bound = function.keywords if isinstance(function, functools.partial) else {}
    names = [name for name, each in bound.items() if _is_stream(each) and (name == first or each.requires_grad)]
    if not names:
        return function, args
    names.sort(key=lambda name: name != first)
    inner, own = function.func, function.args  # not the partial itself, which holds the streams
    rest = {name: each for name, each in bound.items() if name not in names}

    def call(*given: Any, **kwargs: Any) -> Any:
        streams = dict(zip(names, given, strict=False))
        return inner(*own, *given[len(names) :], **rest, **streams, **kwargs)

    return call, (*(bound[name] for name in names), *args)


def _is_stream(value: Any) -> bool:
    """Whether an argument may be what the layers hand on: ``[B, s, H]``, or with more dimensions before."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3


def _storage(tensor: torch.Tensor) -> int:
    """Which memory a tensor is in; saved tensors are other objects over the same."""
    return tensor.untyped_storage()._cdata

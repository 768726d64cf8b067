"""Offload of the tensors that a transformers model's checkpointed layers keep for the backward.

Each checkpointed layer's input is offloaded when the layer starts and copied back for its recomputation; so is the
attention output, if it is kept.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.attention_cache import CheckpointFrame, on_device
from deepspeed_alst.offload.checkpoint_hook import Checkpoint, checkpoint_hook_of


class Chunks(NamedTuple):
    """Layers and norms that run in chunks of tokens (memory_lean/feature.py), and save their inputs chunk by chunk."""

    layers: int
    norms: int
    tokens: int


@dataclass(eq=False)
class Keeping:
    """Tensors kept of a model's checkpointed layers, and where."""

    store: ActivationStore | None  # None keeps them on the device
    keep_last: int = 0  # last layers whose tensors stay on the device
    must_keep_attention: bool = False  # an attention output that cannot be kept is an error instead of a warning
    keeps_attention: bool = False  # in the next forward
    chunks: Chunks | None = None
    layers: list[torch.nn.Module] = field(default_factory=list)  # that can be checkpointed, in the model's order
    _has_kept: bool = False

    def stays(self, layer: torch.nn.Module) -> bool:
        """Return True if the tensors that a checkpointed layer keeps stay on the device."""
        return self.keep_last > 0 and layer in self._checkpointed()[-self.keep_last :]

    def check(self, layer: torch.nn.Module, frame: CheckpointFrame) -> None:
        """Check that the attention outputs of a layer's forward were kept; if not, warn, or raise if they must be."""
        self._has_kept |= bool(frame.kept_attention)
        if not frame.keeps_attention:
            return
        sentences = [f"attention of {type(layer).__name__} ran as {words}" for words in frame.unkept_attention]
        if not self._has_kept and not sentences and layer is self._checkpointed()[-1]:
            sentences = [f"no layer calls attention where transformers has it called ({type(layer).__name__})"]
        for sentence in sentences:
            if self.must_keep_attention:
                raise UnsupportedModelError(
                    f"alst.save_attention_output: {sentence}: its output cannot be kept. It can be kept of the kernels "
                    "of sdpa and flash attention, without dropout. Set the key to false."
                )
            # Python shows a warning of identical text once.
            warnings.warn(f"alst.save_attention_output: {sentence}; it runs again in the backward", stacklevel=2)

    def _checkpointed(self) -> list[torch.nn.Module]:
        return [layer for layer in self.layers if layer.gradient_checkpointing]


def keep_activations(spec: ModelSpec, keeping: Keeping, patches: PatchSet) -> None:
    """Make each checkpointed layer of a model keep its tensors; ``patches.close()`` undoes it."""
    keeping.layers = spec.checkpointed_layers
    if not keeping.layers:
        raise UnsupportedModelError(
            f"alst.activation_checkpoint_cpu_offload: {spec.name} has no layers that "
            "transformers checkpoints one by one (GradientCheckpointingLayer). Set the key to false."
        )
    given_before: list[Any] = []
    for layer in keeping.layers:
        checkpoint_hook_of(layer, patches).around.append(functools.partial(_around, layer, keeping, given_before))


def turn_on_checkpointing(spec: ModelSpec, key: str, patches: PatchSet) -> bool:
    """Turn transformers' gradient checkpointing on for a key until ``patches.close()``; return True if it was off."""
    base = spec.model
    if base.is_activation_checkpointing:
        return False
    if not base.supports_gradient_checkpointing:
        raise UnsupportedModelError(
            f"{key}: {spec.name} does not support gradient checkpointing. Set the key to false."
        )
    has_hook = bool(getattr(base, "_require_grads_hooks", None))
    base.activation_checkpointing_enable()
    if not has_hook:
        patches.callback(base.disable_input_require_grads)
    patches.callback(base.activation_checkpointing_disable)
    return True


def check_checkpointing(spec: ModelSpec, key: str) -> None:
    """Raise if no layer is checkpointed in training, or if transformers offloads the layers' inputs itself."""
    layers = [layer for layer in spec.checkpointed_layers if layer.gradient_checkpointing]
    if not layers:
        raise UnsupportedModelError(
            f"{key}: no layer of {spec.name} is checkpointed. Turn gradient checkpointing on "
            "(model.activation_checkpointing_enable()), or set the key to false."
        )
    function = vars(layers[0]).get("_gradient_checkpointing_func")
    function = getattr(function, "alst_before", function)
    if "_activation_checkpointing_enable" in getattr(getattr(function, "func", None), "__qualname__", ""):
        raise UnsupportedModelError(
            f"{key}: gradient checkpointing was turned on with transformers' own offload, which would copy what this "
            "package copies. Leave offload out of gradient_checkpointing_kwargs, or set the key to false."
        )


def _around(layer: torch.nn.Module, keeping: Keeping, given_before: list[Any], checkpoint: Checkpoint) -> Checkpoint:
    """Wrap a checkpoint in a frame, and offload its inputs to the layer's group of the store."""
    first = list(inspect.signature(type(layer).forward).parameters)[1]  # after self

    @torch.compiler.disable(recursive=False)
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        function, args = _as_positional(function, args, first)
        group = keeping.store.group(keeping.stays(layer)) if keeping.store is not None else None
        frame = CheckpointFrame(on_device if group is None else group.put, keeping.keeps_attention)
        # Detached here: the tensor that a saved-tensor hook gets has no version counter.
        streams = {
            _place(each): each.detach()
            for index, each in enumerate(args)
            if _is_stream(each) and (index == 0 or each.requires_grad)
        }
        # Inputs shared by several layers, such as the embeddings beside the stream, stay on the device.
        first_place = _place(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        leaving = {key: each for key, each in streams.items() if key == first_place or key not in given_before}
        given_before[:] = streams
        is_saved = False

        def pack(tensor: torch.Tensor) -> Any:
            """Return the function that restores a saved tensor, with the frame's tensors, which live as long."""
            nonlocal is_saved
            is_saved = True
            stream = leaving.get(_place(tensor)) if group is not None else None
            return (on_device(tensor) if stream is None else group.put(stream)), frame.kept

        def run(*args: Any, **kwargs: Any) -> Any:
            with frame.running():
                return function(*args, **kwargs)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved[0]()):
                output = checkpoint(run, *args, **kwargs)
        finally:
            streams.clear()
            leaving.clear()
        if is_saved:
            frame.release_kept()
        keeping.check(layer, frame)
        return output

    return call


def _as_positional(
    function: Callable[..., Any], args: tuple[Any, ...], first: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Move the layer's streams to positional arguments, which a checkpoint saves; ``first`` leads.

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
    """Return True if an argument can be a hidden-state stream: ``[B, s, H]``, or with more leading dims."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key of a tensor's memory; saved tensors are other objects over the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()

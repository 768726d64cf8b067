"""Offload of the tensors that a transformers model's checkpointed layers save for the backward.

Each checkpointed layer's input is offloaded when the layer starts and copied back for its recomputation; so is the
attention output, if it is saved.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from deepspeed_alst.attention.attention_cache import CheckpointFrame, on_device
from deepspeed_alst.core.checkpoint_hook import Checkpoint, checkpoint_hook_of
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.offload.activation_store import ActivationStore


class Chunks(NamedTuple):
    """Number of layers and norms that run, and save their inputs, in chunks of tokens (memory_lean/feature.py)."""

    layers: int = 0
    norms: int = 0
    tokens: int = 1
    min_tokens: int = 0
    """Tokens of a shard below which they do not."""


@dataclass(eq=False)
class CheckpointPolicy:
    """Tensors that a model's checkpointed layers save, and where."""

    store: ActivationStore | None  # None leaves them on the device
    keep_last: int = 0  # last layers whose tensors stay on the device
    must_save_attention: bool = False  # an attention output that cannot be saved is an error instead of a warning
    num_saved: int = 0  # first layers that save attention's output, in the next forward
    chunks: Chunks = field(default_factory=Chunks)
    layers: list[torch.nn.Module] = field(default_factory=list)  # that can be checkpointed, in the model's order
    _has_saved: bool = False

    def stays(self, layer: torch.nn.Module) -> bool:
        """Return True if a checkpointed layer's saved tensors stay on the device."""
        return self.keep_last > 0 and layer in self._checkpointed()[-self.keep_last :]

    def saves_attention(self, layer: torch.nn.Module) -> bool:
        """Return True if a checkpointed layer saves attention's output."""
        return layer in self._checkpointed()[: self.num_saved]

    def prefetches_attention(self) -> bool:
        """Return True if a saved output comes back one layer ahead, for which the device then has to have room.

        Where the host has room for some layers' outputs only, the sequence is long: the copy takes little of the layer.
        """
        return self.num_saved >= len(self._checkpointed())

    def check(self, layer: torch.nn.Module, frame: CheckpointFrame) -> None:
        """Warn if a layer's forward has not saved its attention outputs, or raise if it must."""
        self._has_saved |= bool(frame.saved_attention)
        if not frame.saves_attention:
            return
        problems = [f"attention of {type(layer).__name__} ran as {name}" for name in frame.recomputed_attention]
        savers = self._checkpointed()[: self.num_saved]
        if not self._has_saved and not problems and layer is savers[-1]:
            which = f"none of the first {len(savers)} layers ({type(layer).__name__})"
            problems = [f"{which} calls attention through transformers' interface"]
        for problem in problems:
            if self.must_save_attention:
                raise UnsupportedModelError(
                    f"alst.save_attention_output: {problem}, whose output cannot be saved. Supported are kernels of "
                    "sdpa and flash attention, without dropout. Set the key to false."
                )
            # Python shows a warning of identical text once.
            warnings.warn(f"alst.save_attention_output: {problem}; it is recomputed in the backward", stacklevel=2)

    def _checkpointed(self) -> list[torch.nn.Module]:
        return [layer for layer in self.layers if layer.gradient_checkpointing]


def apply_checkpoint_policy(spec: ModelSpec, policy: CheckpointPolicy, patches: PatchSet) -> None:
    """Make each checkpointed layer of a model save its tensors by a policy; ``patches.close()`` undoes it."""
    policy.layers = spec.checkpointed_layers
    if not policy.layers:
        raise UnsupportedModelError(
            f"alst.activation_checkpoint_cpu_offload: {spec.name} has no layers that "
            "transformers checkpoints one by one (GradientCheckpointingLayer). Set the key to false."
        )
    previous_inputs: list[Any] = []
    for layer in policy.layers:
        wrap = functools.partial(_wrap_checkpoint, layer, policy, previous_inputs)
        checkpoint_hook_of(layer, patches).wrappers.append(wrap)


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
    function = getattr(function, "alst_original", function)
    if "_activation_checkpointing_enable" in getattr(getattr(function, "func", None), "__qualname__", ""):
        raise UnsupportedModelError(
            f"{key}: gradient checkpointing was turned on with transformers' own offload, which offloads the same "
            "tensors. Leave offload out of gradient_checkpointing_kwargs, or set the key to false."
        )


def _wrap_checkpoint(
    layer: torch.nn.Module, policy: CheckpointPolicy, previous_inputs: list[Any], checkpoint: Checkpoint
) -> Checkpoint:
    """Run a checkpoint in a frame, and offload its inputs to the layer's group of the store.

    ``previous_inputs`` are the keys of the inputs of the layer that ran before.
    """
    first = list(inspect.signature(type(layer).forward).parameters)[1]  # after self

    @torch.compiler.disable(recursive=False)
    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        function, args = _as_positional(function, args, first)
        group = policy.store.group(policy.stays(layer)) if policy.store is not None else None
        put = on_device if group is None else functools.partial(group.put, ahead=policy.prefetches_attention())
        frame = CheckpointFrame(put, policy.saves_attention(layer))
        # Detached here: the tensor that a saved-tensor hook gets has no version counter.
        inputs = {
            _memory_key(each): each.detach()
            for index, each in enumerate(args)
            if _is_hidden_states(each) and (index == 0 or each.requires_grad)
        }
        # Inputs shared by several layers, such as the embeddings beside the hidden states, stay on the device.
        first_key = _memory_key(args[0]) if args and isinstance(args[0], torch.Tensor) else None
        offloaded = {key: each for key, each in inputs.items() if key == first_key or key not in previous_inputs}
        previous_inputs[:] = inputs
        is_saved = False

        def pack(tensor: torch.Tensor) -> Any:
            """Return the function that restores a saved tensor, with the frame's tensors, which live as long."""
            nonlocal is_saved
            is_saved = True
            hidden = offloaded.get(_memory_key(tensor)) if group is not None else None
            return (on_device(tensor) if hidden is None else group.put(hidden)), frame.saved

        def run(*args: Any, **kwargs: Any) -> Any:
            with frame.running():
                return function(*args, **kwargs)

        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved[0]()):
                output = checkpoint(run, *args, **kwargs)
        finally:
            inputs.clear()
            offloaded.clear()
        if is_saved:
            frame.release()
        policy.check(layer, frame)
        return output

    return call


def _as_positional(
    function: Callable[..., Any], args: tuple[Any, ...], first: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Move hidden states that are bound as keywords to positional arguments, which a checkpoint saves.

    The one named ``first`` leads.
    """
    bound = function.keywords if isinstance(function, functools.partial) else {}
    names = [name for name, each in bound.items() if _is_hidden_states(each) and (name == first or each.requires_grad)]
    if not names:
        return function, args
    names.sort(key=lambda name: name != first)
    inner, own = function.func, function.args  # not the partial itself, which holds the tensors
    rest = {name: each for name, each in bound.items() if name not in names}

    def call(*given: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, given, strict=False))
        return inner(*own, *given[len(names) :], **rest, **named, **kwargs)

    return call, (*(bound[name] for name in names), *args)


def _is_hidden_states(value: Any) -> bool:
    """Return True if an argument can be hidden states: ``[B, s, H]``, or with more leading dims."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 3


def _memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return a key of a tensor's memory, as a saved tensor is another object over the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()

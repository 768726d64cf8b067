"""In-place reuse of the residual stream: an output overwrites its input's storage where nothing else refers to it.

Its first tensor is the embeddings' output, which the decoder's own frame would hold until its end.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.memory_lean.hf_records import HOOKS, MARKS, records_layers
from deepspeed_alst.tiling.gated_mlp import has_user_hook

_CALLERS_OF_LAYERS = ("torch", "deepspeed", "deepspeed_alst")  # which pass arguments on in tuples


class ResidualStream:
    """Tensors of one forward that share the memory of the stream between the last layer and the next."""

    def __init__(self, spec: ModelSpec, calls: ForwardContext, patches: PatchSet) -> None:
        self.calls, self._patches, self._seen = calls, patches, list[Callable[[], torch.Tensor | None]]()
        self._kept = dict[torch.nn.Module, bool]()  # by a caller's name, which the first forward tells
        if spec.embeddings is not None:
            patches.hook(spec.embeddings, "forward", self._note_output)

    def watch(self, module: torch.nn.Module) -> None:
        """Note the inputs of a layer or norm before DeepSpeed's hooks, which give it another tensor of their memory."""
        self._patches.hook(module, "forward_pre", self._note_input)

    def _note_output(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        is_decoders = self.calls.inside and isinstance(output, torch.Tensor) and not has_user_hook(module, but=MARKS)
        self._seen = [weakref.ref(output)] if is_decoders else []

    def _note_input(self, module: torch.nn.Module, args: Any) -> None:
        if self._seen and args and isinstance(args[0], torch.Tensor):
            self._seen.append(weakref.ref(args[0]))

    def take(self, module: torch.nn.Module, x_BsM: torch.Tensor, others: Any = ()) -> list[torch.Tensor]:
        """Return the tensors of a module's input, whose memory its output may take; none if something else has it.

        Args:
            module: the layer or norm.
            x_BsM: its input.
            others: its other arguments.
        """
        seen, self._seen = [each for ref in self._seen if (each := ref()) is not None], []
        memory = _memory(x_BsM)
        others = [each for each in tree_leaves(others) if isinstance(each, torch.Tensor) and each is not x_BsM]
        if not seen or _memory(seen[0]) != memory or has_user_hook(module, but=HOOKS) or records_layers():
            return []
        taken = [*seen, x_BsM]
        if module not in self._kept:
            self._kept[module] = _is_kept_by_a_caller(taken)
        is_free = not self._kept[module] and all(_memory(each) != memory for each in others)
        return taken if is_free and _are_alone(taken) else []

    def replace(self, module: torch.nn.Module, taken: list[torch.Tensor], y_BsM: torch.Tensor) -> None:
        """Continue with a module's output. What still refers to tensors that were taken reads NaN."""
        for each in taken:
            each.data = each.new_full((), torch.nan).expand(each.shape)
        self._seen = [] if has_user_hook(module, but=HOOKS) else [weakref.ref(y_BsM)]


def _is_kept_by_a_caller(taken: list[torch.Tensor]) -> bool:
    """Return True if a function that calls the layer has the stream under two names, or in a container.

    A decoder has it under one, and the embeddings' output as ``inputs_embeds`` too.
    """
    ids, frame = set(map(id, taken)), inspect.currentframe()
    while frame is not None:
        home = frame.f_globals.get("__name__", "")
        if home != "transformers.modeling_layers" and home.partition(".")[0] not in _CALLERS_OF_LAYERS:
            values = {name: value for name, value in frame.f_locals.items() if name != "inputs_embeds"}
            held = [value for value in values.values() if isinstance(value, list | tuple) and ids & set(map(id, value))]
            if held or sum(id(value) in ids for value in values.values()) > 1:
                return True
        frame = frame.f_back
    return False


def _are_alone(taken: list[torch.Tensor]) -> bool:
    """Return True if nothing but these tensors refers to their memory, all of which is theirs.

    Views, detached tensors and what autograd has saved are told by the numbers of references.
    """
    known = {id(each): each for each in (*taken, *(each._base for each in taken)) if each is not None}.values()
    bases = [id(each._base) for each in known]
    if any(each._use_count() > 1 + bases.count(id(each)) for each in known):
        return False
    x = taken[-1]
    storage, is_whole = x.untyped_storage(), x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
    # The storage that is asked here is one more.
    return is_whole and torch._C._storage_Use_Count(storage._cdata) == len(known) + 1


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata

"""Results of tiled modules that a checkpointed layer's recomputation can skip, found from the layer's graph.

Only the forward needs the value of an MLP before a sum with the residual: no backward reads it. Anything outside the
graph counts as a use: a program's hook may do anything with the values that it gets.
"""

import functools
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.offload.hf_checkpoint_hook import checkpoint_hook_of
from deepspeed_alst.tiling.detect_gated_mlp import is_foreign
from deepspeed_alst.tiling.tiled_module import TiledModule

# Graph nodes whose backward needs no value: sums, views, copies and casts.
_NEED_NO_VALUE = (
    "Add",
    "Sub",
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Alias",
    "Clone",
    "ToCopy",
    "Squeeze",
    "Unsqueeze",
)
# Nodes of torch and ZeRO-3 around modules with gradient hooks pass values on; counted dropout redraws its mask.
_HAND_ON = (
    "CountedDropoutBackward",
    "BackwardHookFunctionBackward",
    "PreBackwardFunctionForModuleBackward",
    "PostBackwardFunctionModuleBackward",
)


def watch_checkpoints(layer: torch.nn.Module, works: list[TiledModule], patches: PatchSet) -> None:
    """Find, at the end of a checkpointed layer with a graph, the results that its backward does not need."""
    checkpoint_hook_of(layer, patches).at_end.append(functools.partial(_note_unused_values, layer, works))


def _note_unused_values(layer: torch.nn.Module, works: list[TiledModule], output: Any) -> None:
    is_watched = _is_watched(layer, works)
    outputs = output if isinstance(output, tuple) else (output,)
    ends = [each.grad_fn for each in outputs if isinstance(each, torch.Tensor) and each.grad_fn is not None]
    for work in works:
        node, work.last_node = work.last_node, None
        if node is not None:
            work.value_unused = not is_watched and value_unused(ends, node)


def value_unused(ends: list[Any], node: Any) -> bool:
    """Return True if no node of the graph between ``node`` and ``ends`` needs the value of ``node``."""
    reaches: dict[Any, bool] = {node: True}
    needs_none = True

    def visit(each: Any) -> bool:
        """Return True if the node's input comes from ``node``, through nodes created after it."""
        nonlocal needs_none
        if each not in reaches:
            reaches[each] = False
            made_after = each._sequence_nr() > node._sequence_nr()
            inputs = [inner for inner, _ in each.next_functions if inner is not None] if made_after else []
            reaches[each] = any([visit(inner) for inner in inputs])
            if reaches[each]:
                name = each.name()
                needs_none &= (
                    name.removesuffix("Backward0") in _NEED_NO_VALUE or name in _HAND_ON or _scales_by_number(each)
                )
        return reaches[each]

    found = [visit(end) for end in ends]
    return any(found) and needs_none


def _scales_by_number(node: Any) -> bool:
    """Return True if a node multiplies or divides by a program's number, which autograd keeps in fp64."""
    if node.name() not in ("MulBackward0", "DivBackward0"):
        return False
    # .data does not unpack what a checkpoint has packed, which would run its recomputation.
    factor, value = node._raw_saved_other.data, node._raw_saved_self.data
    is_number = isinstance(factor, torch.Tensor) and factor.dim() == 0 and factor.dtype == torch.float64
    return value is None and is_number


def _is_watched(layer: torch.nn.Module, works: list[TiledModule]) -> bool:
    """Return True if a foreign hook gets values in a layer; hooks in a tiled module get those of tiles."""
    inside = {id(each) for work in works for each in work.module.modules() if each is not work.module}
    hooks = [*torch.nn.modules.module._global_forward_hooks.values()]
    for module in layer.modules():
        if id(module) not in inside:
            hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(is_foreign(hook) for hook in hooks)

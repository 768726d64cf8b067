"""MLPs and experts of a transformers model in tiles; every change goes onto a stack that undoes it."""

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from deepspeed_alst.blocks import TiledMlpBlock
from deepspeed_alst.errors import ConfigError, UnsupportedModelError
from deepspeed_alst.models.token_wise import layer_of, output_features, token_wise_modules
from deepspeed_alst.models.wrapped import base_model
from deepspeed_alst.tiling.experts import by_expert, num_stacked_experts
from deepspeed_alst.tiling.plan import fewest_bytes, row_bytes, sums_fit, tile_rows
from deepspeed_alst.tiling.sequence import TokenWise

_EXPERT_ARGUMENTS = 3  # the tokens, their experts, the experts' weights
# Nodes of the graph whose backward needs no value: sums, and tensors seen, copied or converted.
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


def tile_mlps(model: torch.nn.Module, budget: TiledMlpBlock, leaf: Callable[[Any], None], undo: ExitStack) -> str:
    """Run every token-wise module of a model's decoder layers in tiles; returns what was done, in words.

    Args:
        model: a transformers model, or a wrapper around one.
        budget: of the tiles of one module.
        leaf: called with each module: the engine is to gather its weights as one (engine/leaves.py).
        undo: takes everything back.

    Raises:
        UnsupportedModelError: there is no such module, or one has a dropout, whose draw tiles cannot repeat.
    """
    found = token_wise_modules(model)
    if not found:
        raise UnsupportedModelError(
            f"alst.tiled_mlp_compute: {type(base_model(model)).__name__} has no MLP or experts that take tokens alone, "
            "so nothing could be tiled. Leave the key out."
        )
    by_layer: dict[torch.nn.Module, list[TokenWise]] = {}
    for name, module in found.items():
        _refuse_dropout(name, module)
        work = TokenWise(name, module, budget.fp32_accumulation)
        by_layer.setdefault(layer_of(model, name), []).append(work)
        undo.callback(vars(module).pop, "forward", None)
        if "forward" in vars(module):  # somebody else's patch stays under ours
            undo.callback(setattr, module, "forward", module.forward)
        module.forward = _in_tiles(work, budget)
        leaf(module)
    for layer, works in by_layer.items():
        _watch_checkpoints(layer, works, undo)
    kinds = sorted({type(module).__name__ for module in found.values()})
    return f"{len(found)} {' and '.join(kinds)} in {len(by_layer)} layers, {_budget_in_words(budget)}"


def _in_tiles(work: TokenWise, budget: TiledMlpBlock) -> Callable[..., Any]:
    signature = inspect.signature(work.forward)
    features = functools.cache(functools.partial(output_features, work.module))

    @functools.wraps(work.forward)
    @torch.compiler.disable
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = signature.bind(*args, **kwargs).args
        if not all(isinstance(each, torch.Tensor) for each in rows):
            return work.forward(*args, **kwargs)
        # Experts are told which of them each token goes to; a dense module takes the token alone.
        experts_per_token = rows[1].shape[-1] if len(rows) > 1 else 1
        per_row = row_bytes(features(experts_per_token), rows[0].element_size())
        sums = _sum_bytes(work)
        num_rows = rows[0].shape[:-1].numel()
        fitting = tile_rows(budget, num_rows, per_row, sums)
        if fitting >= num_rows:
            return work.forward(*rows)
        if sums_fit(budget, sums, per_row):
            return work.tiled(fitting, *rows)
        if len(rows) == _EXPERT_ARGUMENTS and num_stacked_experts(work.module):
            # An expert's rows pass it once, and not as often as a token has experts.
            return by_expert(work, fitting * experts_per_token, *rows)
        if budget.tile_bytes == "auto":
            return work.tiled(fitting, *rows)
        raise ConfigError(
            f"alst.tiled_mlp_compute.tile_bytes={budget.tile_bytes}: the fp32 sums of the weight gradients of "
            f"{work.name} take {sums} of them. Use at least {fewest_bytes(sums, per_row)}, 'auto', or "
            "fp32_accumulation: false."
        )

    return forward


def _sum_bytes(work: TokenWise) -> int:
    """Of the sums of a module's weight gradients over its tiles, beside the gradients themselves."""
    trained = [param for param in work.module.parameters() if param.requires_grad]
    if not work.fp32_accumulation or not all(param.element_size() == 2 for param in trained):
        return 0
    return 4 * sum(getattr(param, "ds_numel", param.numel()) for param in trained)


def _watch_checkpoints(layer: torch.nn.Module, works: list[TokenWise], undo: ExitStack) -> None:
    """At the end of a checkpointed layer with a graph, see which results nothing in it will need in the backward."""
    attribute = "_gradient_checkpointing_func"  # transformers' seam, where the checkpoint of a layer is made

    def wrap(*_: Any) -> None:
        checkpoint = vars(layer).get(attribute)
        if checkpoint is None or hasattr(checkpoint, "alst_before"):
            return

        def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                output = function(*args, **kwargs)
                if torch.is_grad_enabled():
                    _note_unused_values(works, output)
                return output

            return checkpoint(run, *args, **kwargs)

        watched.alst_before = checkpoint
        setattr(layer, attribute, watched)

    def unwrap() -> None:
        before = getattr(vars(layer).get(attribute), "alst_before", None)
        if before is not None:
            setattr(layer, attribute, before)

    # At each call: checkpointing may be switched on later.
    undo.callback(layer.register_forward_pre_hook(wrap).remove)
    undo.callback(unwrap)


def _note_unused_values(works: list[TokenWise], output: Any) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    ends = [each.grad_fn for each in outputs if isinstance(each, torch.Tensor) and each.grad_fn is not None]
    for work in works:
        node, work.last_node = work.last_node, None
        if node is not None:
            work.value_unused = value_unused(ends, node)


def value_unused(ends: list[Any], node: Any) -> bool:
    """Whether no node of the graph between ``node`` and ``ends`` needs the value that ``node`` made."""
    reaches: dict[Any, bool] = {node: True}
    needs_none = True

    def visit(each: Any) -> bool:
        """Whether the node's input comes from ``node``, by ways made after it."""
        nonlocal needs_none
        if each not in reaches:
            reaches[each] = False
            made_after = each._sequence_nr() > node._sequence_nr()
            inputs = [inner for inner, _ in each.next_functions if inner is not None] if made_after else []
            reaches[each] = any([visit(inner) for inner in inputs])
            if reaches[each]:
                needs_none &= each.name().removesuffix("Backward0") in _NEED_NO_VALUE or _scales_by_number(each)
        return reaches[each]

    found = [visit(end) for end in ends]
    return any(found) and needs_none


def _scales_by_number(node: Any) -> bool:
    """Whether a node multiplies or divides by a number of the program's, which autograd keeps in fp64."""
    if node.name() not in ("MulBackward0", "DivBackward0"):
        return False
    # Their .data does not unpack what a checkpoint has packed, which would run its recomputation.
    factor, value = node._raw_saved_other.data, node._raw_saved_self.data
    is_number = isinstance(factor, torch.Tensor) and factor.dim() == 0 and factor.dtype == torch.float64
    return value is None and is_number


def _refuse_dropout(name: str, module: torch.nn.Module) -> None:
    rates = {f"{inner}.p": each.p for inner, each in module.named_modules() if isinstance(each, torch.nn.Dropout)}
    rates |= {key: rate for key, rate in vars(module).items() if "dropout" in key and isinstance(rate, float)}
    for key, rate in rates.items():
        if rate > 0:
            raise UnsupportedModelError(
                f"alst.tiled_mlp_compute: {name}.{key}={rate} is a dropout, which tiles would draw again in the "
                "backward. Set it to 0, or leave the key out."
            )


def _budget_in_words(budget: TiledMlpBlock) -> str:
    size = f"{budget.tile_tokens} tokens"
    if budget.tile_tokens is None:
        size = "512 MiB" if budget.tile_bytes == "auto" else f"{budget.tile_bytes / 2**20:.0f} MiB, sums included"
    sums = "fp32" if budget.fp32_accumulation else "the weights' dtype"
    floor = "" if budget.tile_tokens else f" from {budget.min_tokens} tokens on"
    return f"tiles of {size}{floor}, gradients summed in {sums}"

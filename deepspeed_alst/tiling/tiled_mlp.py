"""Tiled MLPs and experts of a transformers model: patches, tile sizes, and results that a recomputation skips."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import ConfigError, UnsupportedModelError
from deepspeed_alst.offload.checkpoint_hook import checkpoint_hook_of
from deepspeed_alst.random_draws.draw_mode import branch
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.tiling.experts import by_expert, num_stacked_experts
from deepspeed_alst.tiling.gated_mlp import is_foreign
from deepspeed_alst.tiling.tiled_module import TiledModule, dropout_rates
from deepspeed_alst.tiling.token_wise import output_features, token_wise_modules

_EXPERT_ARGUMENTS = 3  # tokens, expert indices, expert weights
# Copies per row besides the layers' outputs: the gradient of each, and the activations' saved tensors.
_COPIES = 3
# Fewer rows do not saturate a GPU in a matrix product; more trigger a cuBLAS bug (axolotl pull request 3666).
_FEWEST_ROWS, _MOST_ROWS, _ALIGNMENT = 256, 2**18, 64
# Limits of "auto": bytes for rows, and for fp32 weight gradient sums of all experts at once.
_AUTO_ROW_BYTES, _AUTO_SUM_BYTES = 2**29, 2**30
# Graph nodes whose backward needs no value: sums, views, copies and casts.
_NEED_NO_VALUE = {
    *("AddBackward0", "SubBackward0", "CloneBackward0", "ToCopyBackward0", "SqueezeBackward0", "UnsqueezeBackward0"),
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0"),
}
# Nodes of torch and ZeRO-3 around modules with gradient hooks pass values on; counted dropout redraws its mask.
_NEED_NO_VALUE |= {
    "CountedDropoutBackward",
    "BackwardHookFunctionBackward",
    "PreBackwardFunctionForModuleBackward",
    "PostBackwardFunctionModuleBackward",
}


def tile_mlps(
    spec: ModelSpec,
    budget: TiledMLPConfig,
    leaf: Callable[[Any], None],
    patches: PatchSet,
    calls: ForwardContext | None = None,
) -> str:
    """Run every token-wise module of a model's decoder layers in tiles; return a description.

    ``leaf`` is called with each module, to make it a leaf whose weights ZeRO-3 gathers as one (tiling/zero3_leaf.py).

    Raises:
        UnsupportedModelError: the model has no such module, or one has a dropout, whose draws tiles cannot repeat.
    """
    found = token_wise_modules(spec)
    if not found:
        raise UnsupportedModelError(
            f"alst.tiled_mlp_compute: {spec.name} has no MLP or experts that take tokens alone, "
            "so nothing could be tiled. Leave the key out."
        )
    works = {name: TiledModule(name, module, budget.fp32_accumulation) for name, module in found.items()}
    for work in works.values():
        if calls is None or not calls.draws.are_counted:  # tiles repeat counted draws
            _refuse_dropout(work)
        patches.set(work.module, "forward", _in_tiles(work, budget, calls or ForwardContext()))
        leaf(work.module)
    num_layers = 0
    for path, layer in spec.layers.items():
        if inside := [work for name, work in works.items() if name.startswith(f"{path}.")]:
            num_layers += 1
            at_end = checkpoint_hook_of(layer, patches).at_end
            at_end.append(functools.partial(_note_unused_values, layer, inside))
    kinds = sorted({type(module).__name__ for module in found.values()})
    return f"{len(found)} {' and '.join(kinds)} in {num_layers} layers, {_budget_in_words(budget)}"


def _in_tiles(work: TiledModule, budget: TiledMLPConfig, calls: ForwardContext) -> Callable[..., Any]:
    signature = inspect.signature(work.forward)
    features = functools.cache(functools.partial(output_features, work.module))

    @functools.wraps(work.forward)
    @torch.compiler.disable
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = _rows(work.name, signature, args, kwargs)
        num_rows, element_size = rows[0].shape[:-1].numel(), rows[0].element_size()
        if calls.checking:  # untiled for the unsharded reference; sharded in tiles, however few tokens
            with branch()() if calls.whole else contextlib.nullcontext():  # as many draw branches as in tiles
                return work.forward(*rows) if calls.whole else work.tiled(max(1, num_rows // 2), *rows)
        # Experts also take each token's expert indices; a dense module takes the token alone.
        experts_per_token = rows[1].shape[-1] if len(rows) > 1 else 1
        per_row, sums = row_bytes(features(experts_per_token), element_size), _sum_bytes(work)
        fitting = tile_rows(budget, num_rows, per_row, sums)
        if fitting >= num_rows:
            with branch()():  # as many draw branches as in tiles
                return work.forward(*rows)
        _refuse_packing(work)
        form = work.closed_form(rows, rows[0].dim())
        if form is not None:  # more of its rows fit
            per_row = form.row_bytes(element_size)
            fitting = tile_rows(budget, num_rows, per_row, sums)
        if sums_fit(budget, sums, per_row):
            return work.tiled(fitting, *rows)
        if len(rows) == _EXPERT_ARGUMENTS and num_stacked_experts(work.module):
            # A row passes a single expert here, so experts_per_token times as many rows fit.
            return by_expert(work, fitting * experts_per_token, *rows)
        if budget.tile_bytes == "auto":
            return work.tiled(fitting, *rows)
        least, or_half = fewest_bytes(sums, per_row), ", or fp32_accumulation: false" if sums else ""
        raise ConfigError(
            f"alst.tiled_mlp_compute.tile_bytes={budget.tile_bytes}: {work.name} takes {sums} of them for the fp32 "
            f"sums of its weight gradients and {per_row} for each token of a tile. Use at least {least}, or "
            f"'auto'{or_half}."
        )

    return forward


def _rows(name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors that a token-wise module is called with, without arguments left at their default."""
    given = signature.bind(*args, **kwargs).arguments
    rows = [each for key, each in given.items() if each is not signature.parameters[key].default]
    if rows and all(isinstance(each, torch.Tensor) for each in rows):
        return rows
    kinds = ", ".join(type(each).__name__ for each in rows)
    raise UnsupportedModelError(
        f"{name} was called with {kinds or 'nothing'}: only a module that takes tensors of tokens alone can run in "
        "tiles. Leave alst.tiled_mlp_compute out."
    )


def _sum_bytes(work: TiledModule) -> int:
    """Return the bytes of a module's fp32 weight-gradient sums over tiles, besides the gradients themselves."""
    trained = [param for param in work.module.parameters() if param.requires_grad]
    if not work.fp32_accumulation or not all(param.element_size() == 2 for param in trained):
        return 0
    return 4 * sum(getattr(param, "ds_numel", param.numel()) for param in trained)


def _refuse_packing(work: TiledModule) -> None:
    """Raise for 4-bit weights that a tile's forward without a graph would pack for inference.

    bitsandbytes 0.50 packs them on CPU, permanently, in the first forward in evaluation mode whose input needs no
    gradient; afterwards the layer returns no input gradient.
    """
    if work.module.training or not torch.is_grad_enabled():
        return
    for name, module in work.module.named_modules():
        is_4bit = any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)
        if is_4bit and module.weight.device.type == "cpu":
            raise UnsupportedModelError(
                f"{work.name}.{name} is a bitsandbytes Linear4bit in evaluation mode: in tiles it packs its weight for "
                "inference, and gives no gradient any more. Call model.train(), or leave alst.tiled_mlp_compute out."
            )


def _refuse_dropout(work: TiledModule) -> None:
    for key, rate in dropout_rates(work.module).items():
        if rate > 0:
            raise UnsupportedModelError(
                f"alst.tiled_mlp_compute: {work.name}.{key}={rate} is a dropout, which tiles would draw again in the "
                "backward. Set it to 0, or leave the key out."
            )


def _budget_in_words(budget: TiledMLPConfig) -> str:
    size = f"{budget.tile_tokens} tokens"
    if budget.tile_tokens is None:
        size = "512 MiB" if budget.tile_bytes == "auto" else f"{budget.tile_bytes / 2**20:.0f} MiB, sums included"
    sums = "fp32" if budget.fp32_accumulation else "the weights' dtype"
    floor = "" if budget.tile_tokens else f" from {budget.min_tokens} tokens on"
    return f"tiles of {size}{floor}, gradients summed in {sums}"


def row_bytes(output_features: int, element_size: int) -> int:
    """Return the bytes per row of a tile in the backward, for the layers' total number of output features."""
    return _COPIES * output_features * element_size


def sums_fit(budget: TiledMLPConfig, sum_bytes: int, bytes_per_row: int) -> bool:
    """Return True if the fp32 sums of a module's weight gradients leave room for the fewest rows."""
    if budget.tile_bytes == "auto":
        return sum_bytes <= _AUTO_SUM_BYTES
    return fewest_bytes(sum_bytes, bytes_per_row) <= budget.tile_bytes


def fewest_bytes(sum_bytes: int, bytes_per_row: int) -> int:
    """Return the smallest ``tile_bytes`` that fits the sums and the fewest rows."""
    return sum_bytes + _FEWEST_ROWS * bytes_per_row


def tile_rows(budget: TiledMLPConfig, rows: int, bytes_per_row: int, sum_bytes: int) -> int:
    """Return the rows of a tile; ``rows`` if the module is not tiled.

    Tiles are as even as possible, to avoid a tiny last one. Ranks need not agree on the size: weights are gathered
    once per pass, for any number of tiles (tiling/zero3_leaf.py).
    """
    if budget.tile_tokens is not None:
        return min(rows, budget.tile_tokens)
    if rows == 0 or rows < budget.min_tokens:
        return rows
    left = _AUTO_ROW_BYTES if budget.tile_bytes == "auto" else budget.tile_bytes - sum_bytes
    fitting = max(_FEWEST_ROWS, min(_MOST_ROWS, left // max(1, bytes_per_row)) // _ALIGNMENT * _ALIGNMENT)
    even = -(-rows // -(-rows // fitting))
    return min(rows, -(-even // _ALIGNMENT) * _ALIGNMENT)


def _note_unused_values(layer: torch.nn.Module, works: list[TiledModule], output: Any) -> None:
    """Note, at the end of a checkpointed layer with a graph, the results whose value its backward does not need.

    Only the forward needs the value of an MLP before a sum with the residual. Anything outside the graph counts as a
    use: a program's hook may do anything with the values that it gets. Hooks in a tiled module get those of tiles.
    """
    inside = {id(each) for work in works for each in work.module.modules() if each is not work.module}
    hooks = [*torch.nn.modules.module._global_forward_hooks.values()]
    for module in layer.modules():
        if id(module) not in inside:
            hooks += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    is_watched = any(is_foreign(hook) for hook in hooks)
    outputs = output if isinstance(output, tuple) else (output,)
    ends = [each.grad_fn for each in outputs if isinstance(each, torch.Tensor) and each.grad_fn is not None]
    for work in works:
        node, work.last_node = work.last_node, None
        if node is not None:
            work.value_unused = not is_watched and is_value_unused(ends, node)


def is_value_unused(ends: list[Any], node: Any) -> bool:
    """Return True if no node of the graph between ``node`` and ``ends`` needs the value of ``node``."""
    reaches: dict[Any, bool] = {node: True}
    needs_none = True

    def visit(each: Any) -> bool:
        """Return True if the node's input comes from ``node``, through nodes created after it."""
        nonlocal needs_none
        if each not in reaches:
            made_after = each._sequence_nr() > node._sequence_nr()
            inputs = [inner for inner, _ in each.next_functions if inner is not None] if made_after else []
            reaches[each] = any([visit(inner) for inner in inputs])
            if reaches[each]:
                needs_none &= each.name() in _NEED_NO_VALUE or _scales_by_number(each)
        return reaches[each]

    return any([visit(end) for end in ends]) and needs_none


def _scales_by_number(node: Any) -> bool:
    """Return True if a node multiplies or divides by a program's number, which autograd keeps in fp64."""
    if node.name() not in ("MulBackward0", "DivBackward0"):
        return False
    # .data does not unpack what a checkpoint has packed, which would run its recomputation.
    factor, value = node._raw_saved_other.data, node._raw_saved_self.data
    is_number = isinstance(factor, torch.Tensor) and factor.dim() == 0 and factor.dtype == torch.float64
    return value is None and is_number

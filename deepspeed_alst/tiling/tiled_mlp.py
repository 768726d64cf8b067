"""Tiled MLPs and experts of a transformers model: patches, tile sizes, and results that recomputation skips."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.checkpoint_hook import checkpoint_hook_of
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import ConfigError, UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import branch
from deepspeed_alst.tiling.experts import num_stacked_experts, run_by_expert
from deepspeed_alst.tiling.gated_mlp import has_user_hook
from deepspeed_alst.tiling.tiled_module import TiledModule, dropout_rates
from deepspeed_alst.tiling.token_wise import output_features, token_wise_modules

_EXPERT_ARGUMENTS = 3  # tokens, expert indices, expert weights
# Values per output feature of a layer: the output, its gradient and a saved tensor.
_COPIES = 3
# Fewer rows do not saturate a GPU in a matrix product; more trigger a cuBLAS bug (axolotl pull request 3666).
_MIN_ROWS, _MAX_ROWS, _ALIGNMENT = 256, 2**18, 64
# Limits of "auto": bytes of a tile's rows, and of a module's fp32 weight gradient sums.
_AUTO_ROW_BYTES, _AUTO_SUM_BYTES = 2**29, 2**30
# Graph nodes whose backward needs no input value: sums, views, copies and casts; nodes of torch and ZeRO-3 for gradient
# hooks, which are identities; counted dropout, which redraws its mask.
_VALUE_FREE_NODES = {
    *("AddBackward0", "SubBackward0", "CloneBackward0", "ToCopyBackward0", "SqueezeBackward0", "UnsqueezeBackward0"),
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0"),
    *("BackwardHookFunctionBackward", "PreBackwardFunctionForModuleBackward", "PostBackwardFunctionModuleBackward"),
    "CountedDropoutBackward",
}


def tile_mlps(
    spec: ModelSpec,
    budget: TiledMLPConfig,
    leaf: Callable[[Any], None],
    patches: PatchSet,
    calls: ForwardContext | None = None,
) -> str:
    """Run every token-wise module of a model's decoder layers in tiles; return a description.

    ``leaf`` makes each module a ZeRO-3 leaf, whose weights are gathered once per pass (tiling/zero3_leaf.py).

    Raises:
        UnsupportedModelError: the model has no such module, or one has a dropout, whose draws tiles cannot repeat.
    """
    modules = token_wise_modules(spec)
    if not modules:
        raise UnsupportedModelError(
            f"alst.tiled_mlp_compute: {spec.name} has no MLP or experts whose forward takes only token tensors. "
            "Remove the key."
        )
    calls = calls or ForwardContext()
    tiled_modules = {name: TiledModule(name, module, budget.fp32_accumulation) for name, module in modules.items()}
    for tiled in tiled_modules.values():
        if not calls.draws.are_counted:  # tiles repeat counted draws
            _refuse_dropout(tiled)
        patches.set(tiled.module, "forward", _tiled_forward(tiled, budget, calls))
        leaf(tiled.module)
    num_layers = 0
    for path, layer in spec.layers.items():
        if inside := [tiled for name, tiled in tiled_modules.items() if name.startswith(f"{path}.")]:
            num_layers += 1
            hook = checkpoint_hook_of(layer, patches)
            hook.at_end.append(functools.partial(_record_unused_values, layer, inside))
            for tiled in inside:
                tiled.checkpoint = hook
    classes = sorted({type(module).__name__ for module in modules.values()})
    return f"{len(modules)} {' and '.join(classes)} in {num_layers} layers, {_describe(budget)}"


def _tiled_forward(tiled: TiledModule, budget: TiledMLPConfig, calls: ForwardContext) -> Callable[..., Any]:
    signature = inspect.signature(tiled.forward)
    features = functools.cache(functools.partial(output_features, tiled.module))

    @functools.wraps(tiled.forward)
    @torch.compiler.disable
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = _row_arguments(tiled.name, signature, args, kwargs)
        num_rows, element_size = rows[0].shape[:-1].numel(), rows[0].element_size()
        if calls.checking and not calls.whole:  # a shard runs in tiles, however few its tokens
            return tiled.run_tiled(max(1, num_rows // 2), *rows)
        # Experts also take each token's expert indices; a dense module takes only the tokens.
        experts_per_token = rows[1].shape[-1] if len(rows) > 1 else 1
        per_row, sums = row_bytes(features(experts_per_token), element_size), _sum_bytes(tiled)
        fitting = tile_rows(budget, num_rows, per_row, sums)
        if calls.checking or fitting >= num_rows:
            with branch()():  # as many draw branches as in tiles
                return tiled.forward(*rows)
        _refuse_4bit_packing(tiled)
        form = tiled.closed_form(rows, rows[0].dim())
        if form is not None:  # its rows are smaller
            per_row = form.row_bytes(element_size)
            fitting = tile_rows(budget, num_rows, per_row, sums)
        if not sums_fit(budget, sums, per_row):
            if len(rows) == _EXPERT_ARGUMENTS and num_stacked_experts(tiled.module):
                # A row passes a single expert here, so experts_per_token times as many rows fit.
                return run_by_expert(tiled, fitting * experts_per_token, *rows)
            if budget.tile_bytes != "auto":
                _refuse_tile_bytes(tiled.name, budget.tile_bytes, sums, per_row)
        return tiled.run_tiled(fitting, *rows)

    return forward


def _refuse_tile_bytes(name: str, tile_bytes: int, sums: int, per_row: int) -> NoReturn:
    accumulation = ", or set fp32_accumulation to false" if sums else ""
    raise ConfigError(
        f"alst.tiled_mlp_compute.tile_bytes={tile_bytes}: {name} needs {sums} bytes for the fp32 sums of its weight "
        f"gradients and {per_row} bytes per token of a tile. Use at least {min_tile_bytes(sums, per_row)}, or "
        f"'auto'{accumulation}."
    )


def _row_arguments(name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Return the tensors that a token-wise module is called with, without arguments left at their default."""
    given = signature.bind(*args, **kwargs).arguments
    rows = [each for key, each in given.items() if each is not signature.parameters[key].default]
    if rows and all(isinstance(each, torch.Tensor) for each in rows):
        return rows
    types = ", ".join(type(each).__name__ for each in rows)
    raise UnsupportedModelError(
        f"alst.tiled_mlp_compute: {name} was called with {types or 'no arguments'}; only a module that is called with "
        "token tensors can run in tiles. Remove the key."
    )


def _sum_bytes(tiled: TiledModule) -> int:
    """Return the bytes of a module's fp32 weight gradient sums, beyond the gradients themselves."""
    if not tiled.fp32_accumulation:
        return 0
    halves = (param for param in tiled.module.parameters() if param.requires_grad and param.element_size() == 2)
    return 4 * sum(getattr(param, "ds_numel", param.numel()) for param in halves)


def _refuse_4bit_packing(tiled: TiledModule) -> None:
    """Raise for 4-bit weights that a tile's forward without a graph would pack for inference.

    bitsandbytes 0.50 does so on CPU, permanently, in the first forward in evaluation mode whose input needs no
    gradient; afterwards the layer returns no input gradient.
    """
    if tiled.module.training or not torch.is_grad_enabled():
        return
    for name, module in tiled.module.named_modules():
        is_4bit = any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)
        if is_4bit and module.weight.device.type == "cpu":
            raise UnsupportedModelError(
                f"alst.tiled_mlp_compute: {tiled.name}.{name} is a bitsandbytes Linear4bit in evaluation mode, which "
                "packs its weight for inference in tiles and then has no gradient. Call model.train(), or remove the "
                "key."
            )


def _refuse_dropout(tiled: TiledModule) -> None:
    for key, rate in dropout_rates(tiled.module).items():
        if rate > 0:
            raise UnsupportedModelError(
                f"alst.tiled_mlp_compute: {tiled.name}.{key}={rate} is a dropout, which tiles would redraw in the "
                "backward. Set it to 0, or remove the key."
            )


def _describe(budget: TiledMLPConfig) -> str:
    size = f"{budget.tile_tokens} tokens"
    if budget.tile_tokens is None:
        size = "512 MiB" if budget.tile_bytes == "auto" else f"{budget.tile_bytes / 2**20:.0f} MiB, sums included"
    sums = "fp32" if budget.fp32_accumulation else "the weights' dtype"
    floor = "" if budget.tile_tokens else f" from {budget.min_tokens} tokens on"
    return f"tiles of {size}{floor}, gradients summed in {sums}"


def row_bytes(output_features: int, element_size: int) -> int:
    """Return the bytes per row of a tile in the backward, for the total number of output features of its layers."""
    return _COPIES * output_features * element_size


def sums_fit(budget: TiledMLPConfig, sum_bytes: int, bytes_per_row: int) -> bool:
    """Return True if the fp32 sums of a module's weight gradients leave room for the minimum number of rows."""
    if budget.tile_bytes == "auto":
        return sum_bytes <= _AUTO_SUM_BYTES
    return min_tile_bytes(sum_bytes, bytes_per_row) <= budget.tile_bytes


def min_tile_bytes(sum_bytes: int, bytes_per_row: int) -> int:
    """Return the smallest ``tile_bytes`` that fits the sums and the minimum number of rows."""
    return sum_bytes + _MIN_ROWS * bytes_per_row


def tile_rows(budget: TiledMLPConfig, rows: int, bytes_per_row: int, sum_bytes: int) -> int:
    """Return the rows of a tile; ``rows`` if the module is not tiled.

    Tiles are even, to avoid a tiny last one. Ranks may use different sizes: weights are gathered once per pass, for any
    number of tiles (tiling/zero3_leaf.py).
    """
    if budget.tile_tokens is not None:
        return min(rows, budget.tile_tokens)
    if rows == 0 or rows < budget.min_tokens:
        return rows
    left = _AUTO_ROW_BYTES if budget.tile_bytes == "auto" else budget.tile_bytes - sum_bytes
    fitting = max(_MIN_ROWS, min(_MAX_ROWS, left // max(1, bytes_per_row)) // _ALIGNMENT * _ALIGNMENT)
    even = -(-rows // -(-rows // fitting))
    return min(rows, -(-even // _ALIGNMENT) * _ALIGNMENT)


def _record_unused_values(layer: torch.nn.Module, tiled_modules: list[TiledModule], output: Any) -> None:
    """Record, at the end of a checkpointed layer, the results whose value its backward does not need.

    Only the forward needs the value of an MLP before a sum with the residual. A user's hook counts as a use of all
    values, except inside a tiled module, where it gets those of tiles.
    """
    inside = {id(each) for tiled in tiled_modules for each in tiled.module.modules() if each is not tiled.module}
    is_seen = has_user_hook(*(each for each in layer.modules() if id(each) not in inside))
    outputs = output if isinstance(output, tuple) else (output,)
    ends = [each.grad_fn for each in outputs if isinstance(each, torch.Tensor) and each.grad_fn is not None]
    for tiled in tiled_modules:
        node, tiled.last_node = tiled.last_node, None
        if node is not None:
            tiled.value_unused = not is_seen and is_value_unused(ends, node)


def is_value_unused(ends: list[Any], node: Any) -> bool:
    """Return True if no node of the graph between ``node`` and ``ends`` needs the value of ``node``."""
    reaches: dict[Any, bool] = {node: True}
    needs_no_value = True

    def visit(each: Any) -> bool:
        """Return True if the node's input comes from ``node``, through nodes created after it."""
        nonlocal needs_no_value
        if each not in reaches:
            is_later = each._sequence_nr() > node._sequence_nr()
            inputs = [inner for inner, _ in each.next_functions if inner is not None] if is_later else []
            reaches[each] = any([visit(inner) for inner in inputs])
            if reaches[each]:
                needs_no_value &= each.name() in _VALUE_FREE_NODES or _scales_by_number(each)
        return reaches[each]

    return any([visit(end) for end in ends]) and needs_no_value


def _scales_by_number(node: Any) -> bool:
    """Return True if a node multiplies or divides by a Python number, which autograd saves in fp64."""
    if node.name() not in ("MulBackward0", "DivBackward0"):
        return False
    # .data does not unpack saved tensors, which would run a checkpoint's recomputation.
    factor, value = node._raw_saved_other.data, node._raw_saved_self.data
    is_number = isinstance(factor, torch.Tensor) and factor.dim() == 0 and factor.dtype == torch.float64
    return value is None and is_number

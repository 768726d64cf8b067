"""Tiled MLPs and experts of a transformers model; every patch goes onto an undo stack."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.config.schema import TiledMLPConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.errors import ConfigError, UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import branch
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.tiling.detect_gated_mlp import dropout_rates
from deepspeed_alst.tiling.experts import by_expert, num_stacked_experts
from deepspeed_alst.tiling.skip_unused import watch_checkpoints
from deepspeed_alst.tiling.tile_size import fewest_bytes, row_bytes, sums_fit, tile_rows
from deepspeed_alst.tiling.tiled_module import TiledModule
from deepspeed_alst.tiling.token_wise import layer_of, output_features, token_wise_modules

_EXPERT_ARGUMENTS = 3  # tokens, expert indices, expert weights


def tile_mlps(
    model: torch.nn.Module,
    budget: TiledMLPConfig,
    leaf: Callable[[Any], None],
    patches: PatchSet,
    calls: ForwardContext | None = None,
) -> str:
    """Run every token-wise module of a model's decoder layers in tiles; return a description.

    Args:
        model: a transformers model, or a wrapper around one.
        budget: memory of the tiles of one module.
        leaf: called with each module, to make it a leaf whose weights the engine gathers as one (tiling/zero3_leaf.py).
        patches: undo stack.
        calls: the session's.

    Raises:
        UnsupportedModelError: the model has no such module, or one has a dropout, whose draws tiles cannot repeat.
    """
    found = token_wise_modules(model)
    if not found:
        raise UnsupportedModelError(
            f"alst.tiled_mlp_compute: {type(base_model(model)).__name__} has no MLP or experts that take tokens alone, "
            "so nothing could be tiled. Leave the key out."
        )
    by_layer: dict[torch.nn.Module, list[TiledModule]] = {}
    for name, module in found.items():
        if calls is None or not calls.draws.are_counted:  # tiles repeat counted draws
            _refuse_dropout(name, module)
        work = TiledModule(name, module, budget.fp32_accumulation)
        by_layer.setdefault(layer_of(model, name), []).append(work)
        patches.set(module, "forward", _in_tiles(work, budget, calls or ForwardContext()))
        leaf(module)
    for layer, works in by_layer.items():
        watch_checkpoints(layer, works, patches)
    kinds = sorted({type(module).__name__ for module in found.values()})
    return f"{len(found)} {' and '.join(kinds)} in {len(by_layer)} layers, {_budget_in_words(budget)}"


def _in_tiles(work: TiledModule, budget: TiledMLPConfig, calls: ForwardContext) -> Callable[..., Any]:
    signature = inspect.signature(work.forward)
    features = functools.cache(functools.partial(output_features, work.module))

    @functools.wraps(work.forward)
    @torch.compiler.disable
    def forward(*args: Any, **kwargs: Any) -> Any:
        rows = _rows(work.name, signature, args, kwargs)
        if calls.checking:  # untiled for the unsharded reference; sharded in tiles, however few tokens
            tokens = rows[0].shape[:-1].numel()
            with branch()() if calls.whole else contextlib.nullcontext():  # as many draw branches as in tiles
                return work.forward(*rows) if calls.whole else work.tiled(max(1, tokens // 2), *rows)
        # Experts also take each token's expert indices; a dense module takes the token alone.
        experts_per_token = rows[1].shape[-1] if len(rows) > 1 else 1
        per_row = row_bytes(features(experts_per_token), rows[0].element_size())
        sums = _sum_bytes(work)
        num_rows = rows[0].shape[:-1].numel()
        fitting = tile_rows(budget, num_rows, per_row, sums)
        if fitting >= num_rows:
            with branch()():  # as many draw branches as in tiles
                return work.forward(*rows)
        _refuse_packing(work)
        form = work.closed_form(rows, rows[0].dim())
        if form is not None:  # more of its rows fit
            per_row = form.row_bytes(rows[0].element_size())
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


def _refuse_dropout(name: str, module: torch.nn.Module) -> None:
    for key, rate in dropout_rates(module).items():
        if rate > 0:
            raise UnsupportedModelError(
                f"alst.tiled_mlp_compute: {name}.{key}={rate} is a dropout, which tiles would draw again in the "
                "backward. Set it to 0, or leave the key out."
            )


def _budget_in_words(budget: TiledMLPConfig) -> str:
    size = f"{budget.tile_tokens} tokens"
    if budget.tile_tokens is None:
        size = "512 MiB" if budget.tile_bytes == "auto" else f"{budget.tile_bytes / 2**20:.0f} MiB, sums included"
    sums = "fp32" if budget.fp32_accumulation else "the weights' dtype"
    floor = "" if budget.tile_tokens else f" from {budget.min_tokens} tokens on"
    return f"tiles of {size}{floor}, gradients summed in {sums}"

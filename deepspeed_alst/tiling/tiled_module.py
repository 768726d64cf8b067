"""Tiled token-wise modules: forward without a graph, recomputation in backward, one gradient per weight.

A gated MLP runs in closed form (tiling/gated_mlp.py), any other module by autograd. The recomputation of a checkpointed
layer skips a result whose value is unused, and the backward does not rerun a final Linear of the module: its gradients
are computed from its input. So a step runs an MLP twice, and its last matrix once.

Legend: T rows (tokens, flat), t rows of a tile.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.core.checkpoint_hook import CheckpointHook
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import without_zero_weights
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import Branch, branch
from deepspeed_alst.tiling.gated_mlp import GatedMlp, add_linear_gradients, allows_closed_form, find_gated_mlp
from deepspeed_alst.tiling.weight_gradients import WeightGradients, refuse_foreign_weights, without_hooks

# Relative tolerance between rows run alone and among others: above bf16 rounding, below the effect of mixed rows.
_TOLERANCE = 0.05
_CHECKED_ROWS, _MIN_CHECKED_ROWS = 64, 4


class TiledModule:
    """A module's own forward, run tile by tile; half-precision weight gradients may be summed in fp32."""

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        fp32_accumulation: bool = True,
        forward: Callable[..., torch.Tensor] | None = None,
    ) -> None:
        self.name, self.module, self.fp32_accumulation = name, module, fp32_accumulation
        self.forward = module.forward if forward is None else forward
        self.checkpoint: CheckpointHook | None = None
        """That of its layer; set by tiling/tiled_mlp.py."""
        self.value_unused = False
        """True if a checkpointed layer's recomputation does not use the result; set by tiling/tiled_mlp.py."""
        self.last_node: Any = None
        """Graph node of the last tiled call."""
        self.output: tuple[int, torch.dtype]
        """Features and dtype of the last result."""
        self._final_linear: torch.nn.Linear | None = None
        self._checked_state: tuple[Any, ...] = ()
        """State of the last check: a dropout after the final Linear may be inactive in one state only."""
        self._form: GatedMlp | None = None
        self._form_state: tuple[Any, ...] = ()

    def run_tiled(self, tile_rows: int, *rows: torch.Tensor) -> torch.Tensor:
        """Run the module's own forward, at most ``tile_rows`` rows at a time: ``[..., features] -> [..., features]``.

        Raises:
            UnsupportedModelError: the module is not token-wise.
        """
        draws, lead, dims = branch(), rows[0].shape[:-1], rows[0].dim()
        flat = [each.reshape(-1, each.shape[-1]) for each in rows]
        state = (self.module.training, *dropout_rates(self.module).values())
        if self._checked_state != state:
            first, known = [each[:_CHECKED_ROWS] for each in flat], type(flat[0]).__name__ != "FakeTensor"
            compares = len(first[0]) >= _MIN_CHECKED_ROWS and known and not flat[0].is_meta
            with without_zero_weights(self.module) if compares else contextlib.nullcontext():
                self._check(first, dims, draws, compares)
            self._checked_state = state if lead.numel() >= _MIN_CHECKED_ROWS else ()
        result = TiledPass.apply(self, draws, tile_rows, dims, len(rows), *flat, *self.module.parameters())
        self.last_node = result.grad_fn
        return result.reshape(*lead, result.shape[-1])

    def is_skipped(self) -> bool:
        """Return True in a checkpoint's recomputation that does not use the module's result."""
        return self.value_unused and self.checkpoint is not None and self.checkpoint.recomputing

    def closed_form(self, rows: Sequence[torch.Tensor], dims: int) -> GatedMlp | None:
        """Return the closed form of a module that is a gated MLP in its current state and autocast context, or None.

        ``dims`` is the number of dims of the module's arguments; ``rows`` have their dtype and device.
        """
        if len(rows) > 1 or not allows_closed_form(self.module, self.forward, rows[0]):
            return None
        state = (self.module.training, dims, *dropout_rates(self.module).values(), *self.module.modules())
        if state != self._form_state:
            self._form, self._form_state = find_gated_mlp(self.module, self.forward, dims, rows[0].device), state
        return self._form

    def run_tile(self, rows: Sequence[torch.Tensor], dims: int) -> torch.Tensor:
        """Run the module on one tile, ``[t, features] -> [t, features]``, as a batch of ``dims`` dims.

        Raises:
            UnsupportedModelError: the output does not have the rows of the input.
        """
        inputs = _batch(rows, dims)
        return self._as_rows(self.forward(*inputs), inputs[0])

    def _as_rows(self, output: Any, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[:-1].numel()
        if not isinstance(output, torch.Tensor) or output.shape[:-1] != x.shape[:-1]:
            shape = list(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise UnsupportedModelError(
                f"alst.tiled_mlp_compute: {self.name} returned {shape} for {t} tokens, so it cannot run in tiles. "
                "Remove the key."
            )
        return output.reshape(t, output.shape[-1])

    def tile_gradients(
        self,
        rows: list[torch.Tensor],
        dims: int,
        grad: torch.Tensor,
        sums: WeightGradients,
        autocast: Callable[[], Any],
        is_first: bool,
    ) -> list[torch.Tensor | None]:
        """Return the gradients of a tile's rows from that of its output; add those of the weights to ``sums``."""
        final = self._final_linear
        with torch.enable_grad(), autocast(), PatchSet() as patches:
            if final is not None and (_is_changed(final) or torch.is_autocast_enabled(final.weight.device.type)):
                final = None
            if final is not None:
                patches.set(final, "forward", lambda x: x)  # the module returns the input of its final Linear
            output = self.run_tile(rows, dims)
        if is_first:
            refuse_foreign_weights([output], (*rows, *self.module.parameters()), self.name)
        if final is not None:
            add_linear_gradients(sums, final, grad, output.detach())
            grad = grad @ final.weight.detach()
        trained = [each for each in self.module.parameters() if each in sums]
        grads = gradients_of(output, (*rows, *trained), grad)
        for weight, gradient in zip(trained, grads[len(rows) :], strict=True):
            sums.add(weight, gradient)
        return grads[: len(rows)]

    @torch.no_grad()
    def _check(self, rows: Sequence[torch.Tensor], dims: int, draws: Branch, compares: bool) -> None:
        """Find the final Linear; with ``compares``, check that rows give the same result alone and among others."""
        t, inputs = len(rows[0]), _batch(rows, dims)
        calls: list[tuple[torch.nn.Linear, torch.Tensor, int]] = []

        def record(linear: torch.nn.Linear, args: Any, output: torch.Tensor) -> None:
            calls.append((linear, output, _version(output)))

        with PatchSet() as patches, draws(slice(0, t)):
            for each in self.module.modules():
                if type(each) is torch.nn.Linear and "forward" not in vars(each):
                    patches.hook(each, "forward", record)
            result = self.forward(*inputs)
        whole = self._as_rows(result, inputs[0])
        called = [linear for linear, *_ in calls]
        self._final_linear = None
        for linear, output, version in calls:
            if output is result and version == _version(output) and called.count(linear) == 1:
                self._final_linear = linear
        if not compares:
            return
        tile = slice(t // 4, 3 * t // 4)
        with draws(tile):
            alone = self.run_tile([each[tile] for each in rows], dims)
        if (whole[tile] - alone).norm() > _TOLERANCE * whole[tile].norm():
            raise UnsupportedModelError(
                f"alst.tiled_mlp_compute: the output of {self.name} for a token depends on other tokens, so it cannot "
                "run in tiles. Remove the key."
            )


class TiledPass(torch.autograd.Function):
    """``apply(tiled, draws, tile_rows, dims, num_rows, *rows, *weights)``: output of a module, ``[T, features]``.

    The weights are inputs, so each gets one gradient per pass: ZeRO's and DDP's hooks fire once, and the upstream
    gradient (gradient accumulation, loss scaling) is included.
    """

    @staticmethod
    def forward(
        ctx: Any, tiled: TiledModule, draws: Branch, tile_rows: int, dims: int, num_rows: int, *tensors: torch.Tensor
    ) -> torch.Tensor:
        """Run all tiles; rows are ``[T, features]``, ``dims`` the number of dims of the module's input."""
        rows, ctx.weights = tensors[:num_rows], tensors[num_rows:]
        ctx.tiled, ctx.draws, ctx.tile_rows, ctx.dims = tiled, draws, tile_rows, dims
        ctx.autocast = current_autocast(rows[0].device.type)
        ctx.save_for_backward(*rows)
        T = len(rows[0])
        if tiled.is_skipped():
            features, dtype = tiled.output
            return rows[0].new_full((T, features), float("nan"), dtype=dtype)
        form = tiled.closed_form(rows, dims)
        result = None if form is None else rows[0].new_empty(T, form.down.out_features)
        for tile in _tiles(T, tile_rows):
            if form is not None:
                form.forward(rows[0][tile], result[tile])
                continue
            with draws(tile):
                output = tiled.run_tile([each[tile] for each in rows], dims)
            result = output.new_empty(T, output.shape[-1]) if result is None else result
            result[tile] = output
        tiled.output = result.shape[-1], result.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Rerun each tile with its backward."""
        # First, because it may run a checkpoint's recomputation.
        rows = ctx.saved_tensors
        need_rows, need_weights = ctx.needs_input_grad[5 : 5 + len(rows)], ctx.needs_input_grad[5 + len(rows) :]
        trained = [weight for weight, need in zip(ctx.weights, need_weights, strict=True) if need]
        tiles = _tiles(len(rows[0]), ctx.tile_rows)
        sums = WeightGradients(trained, len(tiles), ctx.tiled.fp32_accumulation)
        grad_rows = [torch.empty_like(each) if need else None for each, need in zip(rows, need_rows, strict=True)]
        with ctx.autocast():
            form = ctx.tiled.closed_form(rows, ctx.dims)
        with without_hooks(trained):
            for tile in tiles:
                if form is not None:
                    grad_tile = None if grad_rows[0] is None else grad_rows[0][tile]
                    form.backward(rows[0][tile], grad[tile], sums, grad_tile)
                    continue
                leaves = [each[tile].detach().requires_grad_(need) for each, need in zip(rows, need_rows, strict=True)]
                with ctx.draws(tile):
                    is_first = tile is tiles[0]
                    grads = ctx.tiled.tile_gradients(leaves, ctx.dims, grad[tile], sums, ctx.autocast, is_first)
                for result, gradient in zip(grad_rows, grads, strict=True):
                    if result is not None:
                        result[tile] = 0 if gradient is None else gradient
        grad_trained = iter(sums.result())
        grad_weights = (next(grad_trained) if need else None for need in need_weights)
        return (None, None, None, None, None, *grad_rows, *grad_weights)


def gradients_of(output: torch.Tensor, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the gradients of inputs from that of the output; None for an input without one."""
    wanted = [each for each in inputs if each.requires_grad]
    if not wanted or not output.requires_grad:
        return [None] * len(inputs)
    grads = iter(torch.autograd.grad(output, wanted, grad, allow_unused=True))
    return [next(grads) if each.requires_grad else None for each in inputs]


def current_autocast(kind: str) -> Callable[[], Any]:
    """Return a factory of the current autocast context on this device type, for a recomputation."""
    return functools.partial(
        torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


def dropout_rates(module: torch.nn.Module) -> dict[str, float]:
    """Return the current dropout rates in a module by name."""
    dropouts = [(name, each) for name, each in module.named_modules() if isinstance(each, torch.nn.Dropout)]
    own = {name: rate for name, rate in vars(module).items() if "dropout" in name and isinstance(rate, float)}
    return {f"{name}.p": each.p for name, each in dropouts} | own


def _tiles(rows: int, tile_rows: int) -> list[slice]:
    """Return the tiles; without rows a single empty one, which gives the output's shape."""
    return [slice(start, min(start + tile_rows, rows)) for start in range(0, max(rows, 1), tile_rows)]


def _batch(rows: Sequence[torch.Tensor], dims: int) -> list[torch.Tensor]:
    """Reshape rows ``[t, features]`` to one batch of t tokens, with the number of dims that the module expects."""
    return [each.reshape(*[1] * (dims - 2), *each.shape) for each in rows]


def _version(x: torch.Tensor) -> int:
    """Return the number of in-place changes."""
    return 0 if x.is_inference() else x._version


def _is_changed(linear: torch.nn.Module) -> bool:
    return bool(linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear))

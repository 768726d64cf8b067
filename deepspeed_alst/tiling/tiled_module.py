"""Tiled token-wise modules: forward without a graph, recomputation in backward, one gradient per weight.

A gated MLP runs in closed form (tiling/gated_mlp.py), any other module by autograd. In the recomputation of a
checkpointed layer the result is skipped if its value is unused, and the backward does not run a final Linear of the
module: its gradients are computed from its input. So a step runs an MLP twice, and its last matrix once.

Legend: T rows (tokens, flat), t rows of a tile.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import Branch, branch
from deepspeed_alst.tiling.gated_mlp import GatedMlp, add_linear_gradients, find_gated_mlp, runs_plainly
from deepspeed_alst.tiling.weight_gradients import WeightGradients, refuse_foreign_weights, without_hooks

# Relative tolerance between rows run alone and among others: above rounding, also in bf16; mixing rows exceeds it.
_ROUNDING = 0.05
_PROBED_ROWS, _FEWEST_CHECKED_ROWS = 64, 4


class TiledModule:
    """A module's own forward, run tile by tile.

    ``fp32_accumulation`` sums half-precision weight gradients over the tiles in fp32.
    """

    def __init__(self, name: str, module: torch.nn.Module, fp32_accumulation: bool = True) -> None:
        self.name, self.module, self.fp32_accumulation = name, module, fp32_accumulation
        self.forward = module.forward
        self.value_unused = False
        """True if a checkpointed layer's recomputation does not use the result; set by tiling/tiled_mlp.py."""
        self.last_node: Any = None
        """Graph node of the last tiled call."""
        self.output: tuple[int, torch.dtype]
        """Features and dtype of the last result."""
        self._last_linear: torch.nn.Linear | None = None
        self._checked: tuple[Any, ...] = ()
        """State that was checked: a dropout after the last Linear may be inactive in one state only."""
        self._form: GatedMlp | None = None
        self._form_state: tuple[Any, ...] = ()

    def tiled(self, tile_rows: int, *rows: torch.Tensor) -> torch.Tensor:
        """Run the module's own forward, at most ``tile_rows`` rows at a time: ``[..., features] -> [..., features]``.

        Raises:
            UnsupportedModelError: the module is not token-wise.
        """
        drawing, lead, dims = branch(), rows[0].shape[:-1], rows[0].dim()
        flat = [each.reshape(-1, each.shape[-1]) for each in rows]
        state = (self.module.training, *dropout_rates(self.module).values())
        if self._checked != state:
            self._check([each[:_PROBED_ROWS] for each in flat], dims, drawing)
            self._checked = state if lead.numel() >= _FEWEST_CHECKED_ROWS else ()
        result = TiledPass.apply(self, drawing, tile_rows, dims, len(rows), *flat, *self.module.parameters())
        self.last_node = result.grad_fn
        return result.reshape(*lead, result.shape[-1])

    def is_skipped(self) -> bool:
        """Return True inside a checkpoint's recomputation, in a backward, that does not use the module's result."""
        return self.value_unused and torch._C._current_graph_task_id() != -1

    def closed_form(self, rows: Sequence[torch.Tensor], dims: int) -> GatedMlp | None:
        """Return the module as a gated MLP if it currently is one, in the current autocast context.

        ``dims`` is the number of dims of its arguments; ``rows`` are tensors like them.
        """
        if len(rows) > 1 or not runs_plainly(self.module, self.forward, rows[0]):
            return None
        state = (self.module.training, dims, *dropout_rates(self.module).values(), *self.module.modules())
        if state != self._form_state:
            self._form, self._form_state = find_gated_mlp(self.module, self.forward, dims, rows[0].device), state
        return self._form

    def run(self, rows: Sequence[torch.Tensor], dims: int) -> torch.Tensor:
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
                f"{self.name} returned {shape} for {t} tokens: it cannot run in tiles. Leave "
                "alst.tiled_mlp_compute out."
            )
        return output.reshape(t, output.shape[-1])

    def gradients(
        self,
        rows: list[torch.Tensor],
        dims: int,
        grad: torch.Tensor,
        sums: WeightGradients,
        autocast: Callable[[], Any],
        is_first: bool,
    ) -> list[torch.Tensor | None]:
        """Return the gradients of one tile's rows, given that of its output; add those of the weights to ``sums``."""
        last = self._last_linear
        with torch.enable_grad(), autocast(), PatchSet() as patches:
            if last is not None and (_is_changed(last) or torch.is_autocast_enabled(last.weight.device.type)):
                last = None
            if last is not None:
                patches.set(last, "forward", lambda x: x)  # the module then returns the input of its last Linear
            output = self.run(rows, dims)
        if is_first:
            refuse_foreign_weights([output], (*rows, *self.module.parameters()), self.name)
        if last is not None:
            add_linear_gradients(sums, last, grad, output.detach())
            grad = grad @ last.weight.detach()
        trained = [each for each in self.module.parameters() if each in sums]
        found = gradients_of(output, (*rows, *trained), grad)
        for weight, gradient in zip(trained, found[len(rows) :], strict=True):
            sums.add(weight, gradient)
        return found[: len(rows)]

    @torch.no_grad()
    def _check(self, rows: Sequence[torch.Tensor], dims: int, drawing: Branch) -> None:
        """Check that rows give the same result alone and among others; find the final Linear."""
        t, inputs = len(rows[0]), _batch(rows, dims)
        made: list[tuple[torch.nn.Linear, torch.Tensor, int]] = []

        def note(layer: torch.nn.Linear, args: Any, output: torch.Tensor) -> None:
            made.append((layer, output, _version(output)))

        with PatchSet() as patches, drawing(slice(0, t)):
            for each in self.module.modules():
                if type(each) is torch.nn.Linear and "forward" not in vars(each):
                    patches.hook(each, "forward", note)
            found = self.forward(*inputs)
        whole = self._as_rows(found, inputs[0])
        calls = [layer for layer, *_ in made]
        self._last_linear = None
        for layer, output, version in made:
            if output is found and version == _version(output) and calls.count(layer) == 1:
                self._last_linear = layer
        if t < _FEWEST_CHECKED_ROWS or type(whole).__name__ == "FakeTensor" or whole.is_meta:
            return
        part = slice(t // 4, 3 * t // 4)
        with drawing(part):
            alone = self.run([each[part] for each in rows], dims)
        if (whole[part] - alone).norm() > _ROUNDING * whole[part].norm():
            raise UnsupportedModelError(
                f"{self.name} gives a token another value among other tokens: it is not token-wise, and cannot run "
                "in tiles. Leave alst.tiled_mlp_compute out."
            )


class TiledPass(torch.autograd.Function):
    """``apply(work, drawing, tile_rows, dims, num_rows, *rows, *weights)``: output of a module, ``[T, features]``.

    The weights are inputs, so each gets one gradient per pass: ZeRO's and DDP's hooks fire once, and the upstream
    gradient (gradient accumulation, loss scaling) is included.
    """

    @staticmethod
    def forward(
        ctx: Any,
        work: TiledModule,
        drawing: Branch,
        tile_rows: int,
        dims: int,
        num_rows: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        """Run all tiles; rows are ``[T, features]``, ``dims`` the dims of the module's input, weights all its own."""
        rows, ctx.weights = tensors[:num_rows], tensors[num_rows:]
        ctx.work, ctx.drawing, ctx.tile_rows, ctx.dims = work, drawing, tile_rows, dims
        ctx.autocast = autocast_as_here(rows[0].device.type)
        ctx.save_for_backward(*rows)
        T = len(rows[0])
        if work.is_skipped():
            features, dtype = work.output
            return rows[0].new_full((T, features), float("nan"), dtype=dtype)
        form = work.closed_form(rows, dims)
        result = None if form is None else rows[0].new_empty(T, form.down.out_features)
        for part in _parts(T, tile_rows):
            if form is not None:
                form.forward(rows[0][part], result[part])
                continue
            with drawing(part):
                output = work.run([each[part] for each in rows], dims)
            result = output.new_empty(T, output.shape[-1]) if result is None else result
            result[part] = output
        work.output = result.shape[-1], result.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """Rerun each tile with its backward."""
        # Must come first: it may run a checkpoint's recomputation.
        rows = ctx.saved_tensors
        need_rows, need_weights = ctx.needs_input_grad[5 : 5 + len(rows)], ctx.needs_input_grad[5 + len(rows) :]
        trained = [weight for weight, need in zip(ctx.weights, need_weights, strict=True) if need]
        parts = _parts(len(rows[0]), ctx.tile_rows)
        sums = WeightGradients(trained, len(parts), ctx.work.fp32_accumulation)
        grad_rows = [torch.empty_like(each) if need else None for each, need in zip(rows, need_rows, strict=True)]
        with ctx.autocast():
            form = ctx.work.closed_form(rows, ctx.dims)
        with without_hooks(trained):
            for part in parts:
                if form is not None:
                    of_rows = None if grad_rows[0] is None else grad_rows[0][part]
                    form.backward(rows[0][part], grad[part], sums, of_rows)
                    continue
                leaves = [each[part].detach().requires_grad_(need) for each, need in zip(rows, need_rows, strict=True)]
                with ctx.drawing(part):
                    is_first = part is parts[0]
                    found = ctx.work.gradients(leaves, ctx.dims, grad[part], sums, ctx.autocast, is_first)
                for result, gradient in zip(grad_rows, found, strict=True):
                    if result is not None:
                        result[part] = 0 if gradient is None else gradient
        of_trained = iter(sums.result())
        of_weights = (next(of_trained) if need else None for need in need_weights)
        return (None, None, None, None, None, *grad_rows, *of_weights)


def gradients_of(output: torch.Tensor, inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor | None]:
    """Return the gradients of inputs, given that of the output; None for one without."""
    wanted = [each for each in inputs if each.requires_grad]
    if not wanted or not output.requires_grad:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(output, wanted, grad, allow_unused=True))
    return [next(found) if each.requires_grad else None for each in inputs]


def autocast_as_here(kind: str) -> Callable[[], Any]:
    """Return a factory of the current autocast context, for a recomputation on this device type."""
    return functools.partial(
        torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


def dropout_rates(module: torch.nn.Module) -> dict[str, float]:
    """Return the dropout rates in a module by location; a program may change them."""
    dropouts = [(name, each) for name, each in module.named_modules() if isinstance(each, torch.nn.Dropout)]
    own = {name: rate for name, rate in vars(module).items() if "dropout" in name and isinstance(rate, float)}
    return {f"{name}.p": each.p for name, each in dropouts} | own


def _parts(rows: int, tile_rows: int) -> list[slice]:
    """Return the tiles; a single empty one if there are no rows, for the output's shape."""
    return [slice(start, min(start + tile_rows, rows)) for start in range(0, max(rows, 1), tile_rows)]


def _batch(rows: Sequence[torch.Tensor], dims: int) -> list[torch.Tensor]:
    """Reshape rows ``[t, features]`` to the dims that the module expects: one batch of t tokens."""
    return [each.reshape(*[1] * (dims - 2), *each.shape) for each in rows]


def _version(x: torch.Tensor) -> int:
    """Return a count of the changes in place."""
    return 0 if x.is_inference() else x._version


def _is_changed(layer: torch.nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))

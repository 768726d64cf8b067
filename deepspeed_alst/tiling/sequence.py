"""Any token-wise module, tile by tile: forward without a graph, recomputed in backward, each weight's gradient once.

The weights are inputs of the autograd function, so autograd hands each of them one gradient a pass: ZeRO's and DDP's
hooks fire once, and what comes in from behind (gradient accumulation, loss scaling) is in it. Over several tiles it is
summed in fp32, so that the number of tiles does not matter (tiling/gradients.py).

In the recomputation of a checkpointed layer the result is not made again where nothing needs its value
(``TokenWise.value_unused``), and the backward does not run a Linear that the module ends in: its gradients are made of
its input. So a step runs an MLP twice, and its last matrix once.

Legend: T rows (tokens, flat), t rows of a tile.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.tiling.gradients import WeightGradients, refuse_foreign_weights, without_hooks

# How far rows may be from the same rows among others, of their norm: rounding, in bf16 too. A mix of rows is further.
_ROUNDING = 0.05
_PROBED_ROWS = 64


class TokenWise:
    """A module's own forward, to be run tile by tile.

    Args:
        name: of the module, for messages.
        module: whose forward it is, as it stands now; its weights get the gradients.
        fp32_accumulation: whether half-precision weight gradients are summed in fp32 over the tiles.
    """

    def __init__(self, name: str, module: torch.nn.Module, fp32_accumulation: bool = True) -> None:
        self.name = name
        self.module = module
        self.fp32_accumulation = fp32_accumulation
        self.value_unused = False
        """Whether nothing needs the result in a checkpointed layer's recomputation; models/tiles.py finds out."""
        self.last_node: Any = None
        """The graph's node of the last tiled call."""
        self.forward = module.forward
        self._last_layer: torch.nn.Linear | None = None
        self._is_checked = False
        self._layout: _Layout | None = None

    def tiled(self, tile_rows: int, *rows: torch.Tensor) -> Any:
        """The module's own forward, at most ``tile_rows`` rows at a time.

        Args:
            tile_rows: rows of a tile, at least 1.
            rows: the module's arguments, ``[..., features]`` with the same T rows in each.

        Returns:
            What the module returns: a tensor or a tuple of them, ``[..., features]`` or ``[T, features]``.

        Raises:
            UnsupportedModelError: the module is not token-wise.
        """
        if not self._is_checked:
            self._check(rows)
        lead = rows[0].shape[:-1]
        flat = [each.reshape(-1, each.shape[-1]) for each in rows]
        result = _Tiled.apply(self, tile_rows, rows[0].dim(), len(rows), *flat, *self.module.parameters())
        self.last_node = result[0].grad_fn
        outputs = tuple(
            each.reshape(*lead, each.shape[-1]) if as_rows else each
            for each, as_rows in zip(result, self.layout.as_rows, strict=True)
        )
        return outputs if self.layout.is_tuple else outputs[0]

    @property
    def layout(self) -> "_Layout":
        """How the module returns its outputs; known after a tile has run."""
        assert self._layout is not None, "no tile has run"
        return self._layout

    def outputs(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one tile; its outputs, ``[t, features]``.

        Raises:
            UnsupportedModelError: an output does not have the rows of the input.
        """
        found = self.forward(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        lead, t = inputs[0].shape[:-1], inputs[0].shape[:-1].numel()
        flat, as_rows = [], []
        for each in outputs:
            is_tensor = isinstance(each, torch.Tensor) and each.dim() > 0
            as_rows.append(is_tensor and each.dim() == inputs[0].dim() and each.shape[:-1] == lead)
            if not is_tensor or not (as_rows[-1] or (each.dim() == 2 and each.shape[0] == t)):
                shape = list(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__
                raise UnsupportedModelError(
                    f"{self.name} returned {shape} for {t} tokens: it cannot run in tiles. Leave "
                    "alst.tiled_mlp_compute out."
                )
            flat.append(each.reshape(t, each.shape[-1]))
        self._layout = _Layout(
            isinstance(found, tuple), tuple(as_rows), [(each.shape[-1], each.dtype) for each in flat]
        )
        return flat

    @contextlib.contextmanager
    def input_of_last_layer(self) -> Iterator[list[torch.Tensor]]:
        """Inside, a forward ends at the module's last Linear, whose input is put into the list."""
        found: list[torch.Tensor] = []

        def end(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0])
            raise _ReachedError

        assert self._last_layer is not None
        handle = self._last_layer.register_forward_pre_hook(end)
        try:
            yield found
        except _ReachedError:
            pass
        finally:
            handle.remove()

    @property
    def last_layer(self) -> torch.nn.Linear | None:
        """The Linear that the module ends in; None if there is none, or if something hangs on its calls."""
        layer = self._last_layer
        if layer is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            return None
        return None if torch.is_autocast_enabled(layer.weight.device.type) else layer

    @torch.no_grad()
    def _check(self, rows: Sequence[torch.Tensor]) -> None:
        """Run some rows alone and among others, which must not matter; see which Linear's output the module returns."""
        some = [each.reshape(-1, each.shape[-1])[:_PROBED_ROWS] for each in rows]
        t = some[0].shape[0]
        made: list[tuple[torch.Tensor, torch.nn.Linear]] = []
        handles = [
            each.register_forward_hook(lambda layer, args, output: made.append((output, layer)))
            for each in self.module.modules()
            if type(each) is torch.nn.Linear and "forward" not in vars(each)
        ]
        try:
            found = self.forward(*_shaped(some, rows[0].dim()))
        finally:
            for handle in handles:
                handle.remove()
        self._last_layer = next((layer for output, layer in made if output is found), None)
        self._is_checked = t >= 4
        if t < 4 or _is_fake(some[0]):
            return
        part = slice(t // 4, 3 * t // 4)
        whole = self.outputs(_shaped(some, rows[0].dim()))
        alone = self.outputs(_shaped([each[part] for each in some], rows[0].dim()))
        for one, other in zip(whole, alone, strict=True):
            if one.is_floating_point() and (one[part] - other).norm() > _ROUNDING * one[part].norm():
                raise UnsupportedModelError(
                    f"{self.name} gives a token another value among other tokens: it is not token-wise, and cannot run "
                    "in tiles. Leave alst.tiled_mlp_compute out."
                )


class _ReachedError(Exception):
    """The last layer was reached."""


class _Layout:
    """How a module returns its outputs."""

    def __init__(self, is_tuple: bool, as_rows: tuple[bool, ...], kinds: list[tuple[int, torch.dtype]]) -> None:
        self.is_tuple = is_tuple
        self.as_rows = as_rows
        """Of each output, whether it has the leading dimensions of the input; else it has the rows, flat."""
        self.kinds = kinds
        """Of each output, its features and dtype."""


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, work: TokenWise, tile_rows: int, dims: int, num_rows: int, *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        rows, ctx.weights = tensors[:num_rows], tensors[num_rows:]
        ctx.work, ctx.tile_rows, ctx.dims = work, tile_rows, dims
        ctx.autocast = autocast_as_here(rows[0].device.type)
        ctx.save_for_backward(*rows)
        T = rows[0].shape[0]
        # Inside a backward this is a recomputation.
        if work.value_unused and torch._C._current_graph_task_id() != -1:
            return tuple(_nobodys_value(rows[0], T, *kind) for kind in work.layout.kinds)
        results: list[torch.Tensor] = []
        for part in _parts(T, tile_rows):
            outputs = work.outputs(_shaped([each[part] for each in rows], dims))
            results = results or [each.new_empty(T, each.shape[-1]) for each in outputs]
            for result, output in zip(results, outputs, strict=True):
                result[part] = output
        ctx.mark_non_differentiable(*(each for each in results if not each.is_floating_point()))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        # First of all: it may run a checkpoint's recomputation.
        rows = ctx.saved_tensors
        num_rows, T = len(rows), rows[0].shape[0]
        need_rows = ctx.needs_input_grad[4 : 4 + num_rows]
        need_weights = ctx.needs_input_grad[4 + num_rows :]
        trained = [weight for weight, need in zip(ctx.weights, need_weights, strict=True) if need]
        parts = _parts(T, ctx.tile_rows)
        sums = WeightGradients(trained, len(parts), ctx.work.fp32_accumulation)
        grad_rows = [torch.empty_like(each) if need else None for each, need in zip(rows, need_rows, strict=True)]
        with without_hooks(trained):
            for part in parts:
                leaves = [each[part].detach().requires_grad_(need) for each, need in zip(rows, need_rows, strict=True)]
                found, of_weights = _tile_gradients(
                    ctx.work, ctx.autocast, leaves, ctx.dims, [each[part] for each in grads], trained, part is parts[0]
                )
                sums.add(of_weights)
                for result, gradient in zip(grad_rows, found, strict=True):
                    if result is not None:
                        result[part] = 0 if gradient is None else gradient
        of_trained = iter(sums.result())
        return (None, None, None, None, *grad_rows, *(next(of_trained) if need else None for need in need_weights))


def _tile_gradients(
    work: TokenWise,
    autocast: Callable[[], Any],
    leaves: list[torch.Tensor],
    dims: int,
    grads: list[torch.Tensor],
    weights: list[torch.Tensor],
    is_first: bool,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """One tile's gradients: of its rows ``[t, features]``, and of the weights."""
    with torch.enable_grad(), autocast():
        layer, inputs = work.last_layer, _shaped(leaves, dims)
        if layer is None:
            outputs = work.outputs(inputs)
        else:
            with work.input_of_last_layer() as found:
                work.forward(*inputs)
            outputs = [found[0].flatten(0, -2)]
    if is_first:
        refuse_foreign_weights(outputs, (*leaves, *work.module.parameters()), work.name)
    of_layer: dict[int, torch.Tensor] = {}
    if layer is not None:
        of_layer, grads = _linear_gradients(layer, outputs[0], grads[0])
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    wanted = [each for each in (*leaves, *weights) if each.requires_grad]
    gradients = (
        torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        if pairs and wanted
        else [None] * len(wanted)
    )
    by_id = {id(each): gradient for each, gradient in zip(wanted, gradients, strict=True)}
    return [by_id.get(id(each)) for each in leaves], [of_layer.get(id(each), by_id.get(id(each))) for each in weights]


def _linear_gradients(
    layer: torch.nn.Linear, inputs: torch.Tensor, grad: torch.Tensor
) -> tuple[dict[int, torch.Tensor], list[torch.Tensor]]:
    """Of ``y = x W' + b``: the gradients of W and b by their ids, and that of x, from those of y ``[t, features]``."""
    x = inputs.detach()
    found = {}
    if layer.weight.requires_grad:
        found[id(layer.weight)] = grad.t() @ x
    if layer.bias is not None and layer.bias.requires_grad:
        found[id(layer.bias)] = grad.sum(0)
    return found, [grad @ layer.weight.detach()]


def autocast_as_here(kind: str) -> Callable[[], Any]:
    """Makes the autocast context that is in force now, for a recomputation on a device of this kind."""
    return functools.partial(
        torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


def _nobodys_value(like: torch.Tensor, T: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """A result that is not made. If somebody looks at it after all, gradients are no numbers rather than wrong ones."""
    return like.new_full((T, features), float("nan") if dtype.is_floating_point else 0, dtype=dtype)


def _parts(rows: int, tile_rows: int) -> list[slice]:
    """The tiles; a single empty one where there are no rows, for their shapes."""
    return [slice(start, min(start + tile_rows, rows)) for start in range(0, max(rows, 1), tile_rows)]


def _shaped(rows: Sequence[torch.Tensor], dims: int) -> list[torch.Tensor]:
    """Rows ``[t, features]`` with as many dimensions as the module is used to: one batch of t tokens."""
    return [each.reshape(*[1] * (dims - 2), *each.shape) for each in rows]


def _is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no values: values cannot be looked at."""
    return type(x).__name__ == "FakeTensor" or x.is_meta

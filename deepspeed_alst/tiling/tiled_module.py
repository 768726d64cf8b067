"""Tiled token-wise modules: forward without a graph, recomputation in backward, one gradient per weight.

In the recomputation of a checkpointed layer the result is skipped if its value is unused
(``TiledModule.value_unused``), and the backward does not run a final Linear of the module: its gradients are computed
from its input. So a step runs an MLP twice, and its last matrix once.

Legend: T rows (tokens, flat), t rows of a tile.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import Branch, branch
from deepspeed_alst.tiling.detect_gated_mlp import ClosedForm, dropout_rates
from deepspeed_alst.tiling.gated_mlp import GatedMlp
from deepspeed_alst.tiling.tiled_pass import TiledPass, shaped

# Relative tolerance between rows run alone and among others: above rounding, also in bf16; mixing rows exceeds it.
_ROUNDING = 0.05
_PROBED_ROWS = 64
_FEWEST_CHECKED_ROWS = 4


class TiledModule:
    """A module's own forward, run tile by tile.

    Args:
        name: name of the module, for messages.
        module: the module, with its current forward; its weights get the gradients.
        fp32_accumulation: True to sum half-precision weight gradients over the tiles in fp32.
    """

    def __init__(self, name: str, module: torch.nn.Module, fp32_accumulation: bool = True) -> None:
        self.name = name
        self.module = module
        self.fp32_accumulation = fp32_accumulation
        self.value_unused = False
        """True if a checkpointed layer's recomputation does not use the result; set by tiling/tiled_mlp.py."""
        self.last_node: Any = None
        """Graph node of the last tiled call."""
        self.forward = module.forward
        self._form = ClosedForm(module, self.forward)
        self._last_layer: torch.nn.Linear | None = None
        self._checked: tuple[Any, ...] = ()
        """State that was checked: a dropout after the last Linear may be inactive in one state only."""
        self._layout: _Layout | None = None

    def tiled(self, tile_rows: int, *rows: torch.Tensor) -> Any:
        """Run the module's own forward, at most ``tile_rows`` rows at a time.

        Args:
            tile_rows: rows of a tile, at least 1.
            rows: the module's arguments, ``[..., features]`` with the same T rows in each.

        Returns:
            The module's output: a tensor or a tuple of them, ``[..., features]`` or ``[T, features]``.

        Raises:
            UnsupportedModelError: the module is not token-wise.
        """
        drawing = branch()
        state = (self.module.training, *dropout_rates(self.module).values())
        if self._checked != state:
            self._check(rows, drawing)
            self._checked = state if rows[0].shape[:-1].numel() >= _FEWEST_CHECKED_ROWS else ()
        lead = rows[0].shape[:-1]
        flat = [each.reshape(-1, each.shape[-1]) for each in rows]
        result = TiledPass.apply(self, drawing, tile_rows, rows[0].dim(), len(rows), *flat, *self.module.parameters())
        self.last_node = result[0].grad_fn
        outputs = tuple(
            each.reshape(*lead, each.shape[-1]) if as_rows else each
            for each, as_rows in zip(result, self.layout.as_rows, strict=True)
        )
        return outputs if self.layout.is_tuple else outputs[0]

    def closed_form(self, rows: Sequence[torch.Tensor], dims: int) -> GatedMlp | None:
        """Return the module as a gated MLP if it currently is one; call it in the module's autocast context.

        Args:
            rows: its arguments, or tensors like them.
            dims: number of dims of the module's arguments.
        """
        form = self._form.now(rows[0], dims) if len(rows) == 1 else None
        if form is not None:
            self._layout = _Layout(False, (True,), [(form.down.out_features, rows[0].dtype)])
        return form

    @property
    def layout(self) -> "_Layout":
        """Output layout of the module; known after a tile has run."""
        assert self._layout is not None, "no tile has run"
        return self._layout

    def outputs(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one tile and return its outputs, ``[t, features]``.

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
        """Stop a forward in the context at the module's last Linear, and append its input to the list."""
        found: list[torch.Tensor] = []

        def end(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0])
            raise _ReachedError

        assert self._last_layer is not None
        with PatchSet() as patches, contextlib.suppress(_ReachedError):
            patches.hook(self._last_layer, "forward_pre", end)
            yield found

    @property
    def last_layer(self) -> torch.nn.Linear | None:
        """Final Linear of the module; None if it is missing, hooked or patched, or under autocast."""
        layer = self._last_layer
        if layer is None or layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            return None
        return None if torch.is_autocast_enabled(layer.weight.device.type) else layer

    @torch.no_grad()
    def _check(self, rows: Sequence[torch.Tensor], drawing: Branch) -> None:
        """Check that rows give the same result alone and among others; find the final Linear."""
        some = [each.reshape(-1, each.shape[-1])[:_PROBED_ROWS] for each in rows]
        t = some[0].shape[0]
        made: list[tuple[torch.Tensor, torch.nn.Linear]] = []
        with PatchSet() as patches, drawing(slice(0, t)):
            for each in self.module.modules():
                if type(each) is torch.nn.Linear and "forward" not in vars(each):
                    patches.hook(each, "forward", lambda layer, args, output: made.append((output, layer)))
            found = self.forward(*shaped(some, rows[0].dim()))
        self._last_layer = next((layer for output, layer in made if output is found), None)
        if t < _FEWEST_CHECKED_ROWS or _is_fake(some[0]):
            return
        part = slice(t // 4, 3 * t // 4)
        with drawing(slice(0, t)):
            whole = self.outputs(shaped(some, rows[0].dim()))
        with drawing(part):
            alone = self.outputs(shaped([each[part] for each in some], rows[0].dim()))
        if len(some) == 1:
            self._form.check(some[0], rows[0].dim(), whole[0])
        for one, other in zip(whole, alone, strict=True):
            if one.is_floating_point() and (one[part] - other).norm() > _ROUNDING * one[part].norm():
                raise UnsupportedModelError(
                    f"{self.name} gives a token another value among other tokens: it is not token-wise, and cannot run "
                    "in tiles. Leave alst.tiled_mlp_compute out."
                )


class _ReachedError(Exception):
    """Raised when the last layer is reached."""


class _Layout:
    """Output layout of a module."""

    def __init__(self, is_tuple: bool, as_rows: tuple[bool, ...], kinds: list[tuple[int, torch.dtype]]) -> None:
        self.is_tuple = is_tuple
        self.as_rows = as_rows
        """True for each output with the leading dims of the input; False for one with flat rows."""
        self.kinds = kinds
        """Features and dtype of each output."""


def _is_fake(x: torch.Tensor) -> bool:
    """Return True if a tensor has a shape but no values to inspect."""
    return type(x).__name__ == "FakeTensor" or x.is_meta

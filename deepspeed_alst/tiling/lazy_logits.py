"""Deferred logits, materialized at first use; the loss computes them one tile at a time.

A causal language model calls its head, applies a few ops to the logits (a scale, a soft cap), and passes them to its
loss. While a forward has labels, the head returns ``LazyLogits``, which record these ops.

Legend: B batch, s tokens of this rank's shard, T = B*s, t rows of a tile, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.distributed.sequence_loss import shard_loss
from deepspeed_alst.random_draws.draw_mode import Branch, branch
from deepspeed_alst.tiling.loss import OnTheWay, Step, loss_tile_rows, on_the_way, tiled_loss

# Elementwise ops on logits, recorded if their other arguments are scalars.
_RECORDED = {
    *("mul", "multiply", "rmul", "div", "divide", "true_divide", "truediv", "rdiv", "rtruediv"),
    *("add", "radd", "sub", "rsub", "neg", "tanh", "float", "double", "to", "detach"),
}
# Answered without materializing the logits.
_OF_THE_SHAPE = {"size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "__len__"}
_OF_THE_VALUES = {torch.Tensor.data.__get__, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}
_VIEWS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


@dataclass
class LazyHead:
    """LM head of one model, with the state of its deferred logits."""

    module: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    """Original forward of the module."""
    budget: TiledLossConfig
    """Config of the tiled loss: size of a tile's logits, and backend."""
    deferring: bool = False
    logits_wanted: bool = False
    """True if the model's caller asked for logits: they are materialized at the end of its forward."""
    work: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Function that the head's next call runs instead of its forward, with its weights gathered."""
    is_tiled: bool = False
    """True if the loss of this forward was computed in tiles."""
    for_loss: "LazyLogits | None" = None
    """Logits of the last forward, if its loss is computed after it: ZeRO-3's hooks detach a model's outputs."""
    kept: list[torch.Tensor] | None = None
    """Copy of the weights for the logits of evaluations, until the next forward in training."""

    def copy_weights(self) -> list[torch.Tensor]:
        """Return a copy of the weights, the last one if they have not changed.

        A rank may use an evaluation's logits alone, or after an optimizer step: it could not all-gather the weights.
        """
        params = [param.detach() for param in self.module.parameters()]
        if self.kept is None or not all(map(torch.equal, self.kept, params)):
            self.kept = [param.clone() for param in params]
        return self.kept

    def forward_with(self, weights: list[torch.Tensor], hidden_BsH: torch.Tensor) -> torch.Tensor:
        """Run the head's own forward with other weights."""
        params = list(self.module.parameters())
        before = [param.data for param in params]
        try:
            for param, weight in zip(params, weights, strict=True):
                param.data = weight
            return self.forward(hidden_BsH)
        finally:
            for param, data in zip(params, before, strict=True):
                param.data = data


class LazyLogits(torch.Tensor):
    """Lazy ``[B, s, V]`` logits; any op not known to be elementwise materializes them."""

    @staticmethod
    def __new__(cls, head: LazyHead, hidden_BsH: torch.Tensor, steps: tuple[Step, ...] = (), *_: Any) -> "LazyLogits":
        """Create a tensor with a shape and no storage."""
        weight = next(param for param in head.module.parameters() if param.dim() > 1 or hasattr(param, "ds_shape"))
        vocab = getattr(head.module, "out_features", None) or getattr(weight, "ds_shape", weight.shape)[0]
        dtype = _after(hidden_BsH.new_empty(0), steps).dtype
        shape = (*hidden_BsH.shape[:-1], vocab)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden_BsH.device)

    def __init__(
        self,
        head: LazyHead,
        hidden_BsH: torch.Tensor,
        steps: tuple[Step, ...] = (),
        weights: list[torch.Tensor] | None = None,
        drawing: Branch | None = None,
    ) -> None:
        self._head, self._hidden, self._steps, self._weights = head, hidden_BsH, steps, weights
        self._drawing = branch() if drawing is None else drawing
        self._made: torch.Tensor | None = None

    def loss(self, labels_Bs: torch.Tensor, divisor: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Sum the cross-entropy of the labelled tokens and divide it, ``[B, s], [] -> []``."""
        head, vocab = self._head, self.shape[-1]
        head.is_tiled = True
        kernel, steps = _kernel_of(head.budget.backend, self._hidden, self._steps)

        def work(hidden_TH: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                self._weights = head.copy_weights()
            return tiled_loss(
                lambda tile: _after(head.forward(tile), steps),
                list(head.module.parameters()),
                hidden_TH,
                labels_Bs.flatten().to(hidden_TH.device),
                1 / divisor.to(hidden_TH.device),
                loss_tile_rows(head.budget, vocab, in_place=kernel is not None and not steps),
                label_smoothing,
                kernel,
                self._drawing,
            )

        return self._call(work, self._hidden.flatten(0, -2))

    def make(self) -> torch.Tensor:
        """Materialize the logits, ``[B, s, V]``, of an evaluation with the weights that it had."""
        if self._made is None:
            with self._drawing():
                if self._weights is not None:
                    logits = self._head.forward_with(self._weights, self._hidden)
                else:
                    logits = self._call(self._head.forward, self._hidden)
            self._made = _after(logits, self._steps)
        return self._made

    def _call(self, work: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Run ``work`` in a call of the head's module, whose hooks gather its weights."""
        self._head.work = work
        try:
            return self._head.module(hidden)
        finally:
            self._head.work = None

    def _then(self, *step: Any) -> "LazyLogits":
        return LazyLogits(self._head, self._hidden, (*self._steps, step), self._weights, self._drawing)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name in _OF_THE_SHAPE or name == "__set__" or (name == "__get__" and func not in _OF_THE_VALUES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        places = [place for place, each in enumerate(args) if isinstance(each, cls)]
        if name == "contiguous" and places:
            return args[0]
        others = [each for each in (*args, *kwargs.values()) if not isinstance(each, cls)]
        is_plain = not any(isinstance(each, torch.Tensor) and (each.dim() or each.requires_grad) for each in others)
        is_recorded = name.removeprefix("__").removesuffix("__") in _RECORDED
        if is_recorded and is_plain and len(places) == 1 and args[places[0]]._made is None:
            place = places[0]
            return args[place]._then(func, args[:place], args[place + 1 :], kwargs)
        return func(*_made(args), **_made(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _VIEWS and isinstance(args[0], cls) and args[0]._made is None:
            return args[0]._then(torch.Tensor.detach, (), (), {})
        return func(*_made(args), **_made(kwargs or {}))


def _made(arguments: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.make, arguments)


def _after(logits: torch.Tensor, steps: tuple[Step, ...]) -> torch.Tensor:
    for function, before, after, keywords in steps:
        logits = function(*before, logits, *after, **keywords)
    return logits


def _kernel_of(backend: str, hidden: torch.Tensor, steps: tuple[Step, ...]) -> tuple[OnTheWay | None, tuple[Step, ...]]:
    """Return the logit ops fused into the loss kernel, None without a kernel, and the steps left to torch."""
    if backend == "torch" or hidden.dtype == torch.float64:
        return None, steps
    try:  # Triton is imported on demand: not every system has it
        from deepspeed_alst.kernels.registry import has_kernel, runs_on

        if not runs_on(hidden.device):
            return None, steps
        import deepspeed_alst.kernels.cross_entropy  # noqa: F401
    except ImportError:
        return None, steps
    by_liger = backend == "liger" and runs_on(hidden.device)
    if not by_liger and not has_kernel("cross_entropy", hidden.device):
        return None, steps
    fused = on_the_way(steps)
    if fused is None or (by_liger and fused.logit_scale != 1):
        return OnTheWay(by_liger=by_liger), steps
    return replace(fused, by_liger=by_liger), ()


def share_of_loss(
    logits: torch.Tensor | LazyLogits,
    labels_Bs: torch.Tensor,
    divisor: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Compute this rank's share of a loss, ``[B, s, V], [B, s], [] -> []``; deferred logits in tiles."""
    if isinstance(logits, LazyLogits):
        return logits.loss(labels_Bs, divisor, label_smoothing)
    return shard_loss(logits.flatten(0, -2), labels_Bs.flatten(), divisor, label_smoothing)

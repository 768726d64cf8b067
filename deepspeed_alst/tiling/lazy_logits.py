"""Lazy logits, materialized at first use; the loss computes them one tile at a time.

A causal language model calls its head, applies a few ops to the logits (a scale, a softcap), and passes them to its
loss. In a forward with labels the head returns ``LazyLogits``, which record these ops.

Legend: B batch, s tokens of this rank's shard, T = B*s, t rows of a tile, H hidden size, V vocabulary.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only

from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.distributed.sequence_loss import shard_loss
from deepspeed_alst.kernels import define_ops
from deepspeed_alst.random_draws.draw_mode import Branch, branch
from deepspeed_alst.tiling.loss import LogitOps, LogitTransform, fuse_ops, loss_tile_rows, tiled_loss

if TYPE_CHECKING:
    from deepspeed_alst.core.forward_context import ForwardContext

# Elementwise ops on logits, recorded if their other arguments are scalars.
_RECORDED = {
    *("mul", "multiply", "rmul", "div", "divide", "true_divide", "truediv", "rdiv", "rtruediv"),
    *("add", "radd", "sub", "rsub", "neg", "tanh", "float", "double", "to", "detach"),
}
# Attributes and methods that do not materialize the logits, and attributes that do.
_SHAPE_QUERIES = {"size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "__len__"}
_VALUE_GETTERS = {torch.Tensor.data.__get__, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}
_DETACHES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


@dataclass
class LazyHead:
    """LM head of one model, with the state of its lazy logits."""

    module: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    """Original forward of the module."""
    budget: TiledLossConfig
    calls: "ForwardContext | None" = None
    """State of the model's forwards."""
    deferring: bool = False
    """True in a forward whose logits are lazy."""
    expects_loss: bool = False
    """True in a forward that is expected to compute the loss from these logits."""
    logits_wanted: bool = False
    """True to materialize the logits at the end of the model's forward."""
    override: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Function that the head's next call runs instead of its forward, with its weights gathered."""
    is_tiled: bool = False
    """True if the loss of this forward was computed in tiles."""
    weights_copy: list[torch.Tensor] | None = None
    """Copy of the weights for the logits of evaluations, until the next forward in training."""

    def copy_weights(self) -> list[torch.Tensor]:
        """Return a copy of the weights, the previous one if they are unchanged.

        Logits of an evaluation may be used on one rank only or after an optimizer step: no all-gather is possible then.
        """
        params = [param.detach() for param in self.module.parameters()]
        if self.weights_copy is None or not all(map(torch.equal, self.weights_copy, params)):
            self.weights_copy = [param.clone() for param in params]
        return self.weights_copy

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
    def __new__(cls, head: LazyHead, hidden_BsH: torch.Tensor, ops: LogitOps = (), *_: Any) -> "LazyLogits":
        """Create a tensor without storage."""
        weight = next(param for param in head.module.parameters() if param.dim() > 1 or hasattr(param, "ds_shape"))
        vocab = getattr(head.module, "out_features", None) or getattr(weight, "ds_shape", weight.shape)[0]
        dtype = _apply_ops(hidden_BsH.new_empty(0), ops).dtype
        shape = (*hidden_BsH.shape[:-1], vocab)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden_BsH.device)

    def __init__(
        self,
        head: LazyHead,
        hidden_BsH: torch.Tensor,
        ops: LogitOps = (),
        weights: list[torch.Tensor] | None = None,
        draws: Branch | None = None,
    ) -> None:
        self._head, self._hidden, self._ops, self._weights = head, hidden_BsH, ops, weights
        self._draws = branch() if draws is None else draws
        self._value: torch.Tensor | None = None
        weights_train = any(param.requires_grad for param in head.module.parameters())
        self.has_grad = torch.is_grad_enabled() and (hidden_BsH.requires_grad or weights_train)
        """True if results computed from these logits require a gradient."""

    def loss(self, labels_Bs: torch.Tensor, divisor: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Return the summed cross-entropy of the labelled tokens over ``divisor``: ``[B, s], [] -> []``."""
        head, vocab = self._head, self.shape[-1]
        head.is_tiled = True
        kernel, ops = _split_ops(head.budget.backend, self._hidden, self._ops)

        def loss(hidden_TH: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                self._weights = head.copy_weights()
            return tiled_loss(
                lambda tile: _apply_ops(head.forward(tile), ops),
                list(head.module.parameters()),
                hidden_TH,
                labels_Bs.flatten().to(hidden_TH.device),
                1 / divisor.to(hidden_TH.device),
                loss_tile_rows(head.budget, vocab, in_place=kernel is not None and not ops),
                label_smoothing,
                kernel,
                self._draws,
            )

        return self._call(loss, self._hidden.flatten(0, -2))

    def hidden_rows(self) -> torch.Tensor:
        """Return the head's input as rows, ``[T, H]``."""
        return self._hidden.flatten(0, -2)

    @torch.no_grad()
    def of_hidden(self, hidden_tH: torch.Tensor) -> torch.Tensor:
        """Return the logits of a tile with the weights kept by ``keep_weights``, ``[t, V]``."""
        assert self._weights is not None
        return _apply_ops(self._head.forward_with(self._weights, hidden_tH), self._ops)

    def keep_weights(self) -> None:
        """Keep a copy of the head's weights for ``of_hidden``. Collective under ZeRO 3."""

        def keep(hidden: torch.Tensor) -> torch.Tensor:
            self._weights = self._head.copy_weights()
            return hidden

        self._call(keep, self._hidden)

    def of_tokens(
        self,
        function: Callable[..., torch.Tensor],
        *rows: torch.Tensor,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return numbers of each token, made in tiles, in the backward again: ``[T, V], [T, r]... -> [T, k]``.

        Args:
            function: of a tile, ``[t, V], [t, r]... -> [t, k]``.
            rows: other arguments of it.
            chosen: rows to compute, the others being zeros; None for all.
        """
        from deepspeed_alst.tiling.tiled_module import TiledModule, TiledPass

        head, ops = self._head, self._ops

        def number(hidden_tH: torch.Tensor, *tiles: torch.Tensor) -> torch.Tensor:
            return function(_apply_ops(head.forward(hidden_tH), ops), *tiles)

        tiled, tile_rows = (
            TiledModule("The head", head.module, forward=number),
            loss_tile_rows(head.budget, self.shape[-1]),
        )

        def numbers(hidden_TH: torch.Tensor) -> torch.Tensor:
            inputs = [hidden_TH, *rows] if chosen is None else [each[chosen] for each in (hidden_TH, *rows)]
            weights = head.module.parameters() if self.has_grad else ()
            found = TiledPass.apply(tiled, self._draws, tile_rows, 2, len(inputs), *inputs, *weights)
            if chosen is None:
                return found
            return found.new_zeros((len(hidden_TH), found.shape[1])).index_copy(0, chosen, found)

        return self._call(numbers, self.hidden_rows())

    def materialize(self) -> torch.Tensor:
        """Compute the logits, ``[B, s, V]``; in an evaluation with the weights at the time of its loss."""
        if self._value is None:
            with self._draws():
                if self._weights is not None:
                    logits = self._head.forward_with(self._weights, self._hidden)
                else:
                    logits = self._call(self._head.forward, self._hidden)
            self._value = _apply_ops(logits, self._ops)
        return self._value

    def _call(self, function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Run a function in a call of the head's module, whose hooks gather its weights."""
        self._head.override = function
        try:
            return self._head.module(hidden)
        finally:
            self._head.override = None

    def _append(self, *op: Any) -> "LazyLogits":
        return LazyLogits(self._head, self._hidden, (*self._ops, op), self._weights, self._draws)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name in _SHAPE_QUERIES or name == "__set__" or (name == "__get__" and func not in _VALUE_GETTERS):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        indices = [index for index, each in enumerate(args) if isinstance(each, cls)]
        if name == "contiguous" and indices:
            return args[0]
        if name == "detach" and is_called_by_deepspeed():
            # ZeRO 3 detaches the outputs of modules in an autograd function, whose graph these ops do not have.
            found = LazyLogits(args[0]._head, args[0]._hidden, args[0]._ops, args[0]._weights, args[0]._draws)
            found.has_grad = args[0].has_grad
            return found
        others = [each for each in (*args, *kwargs.values()) if not isinstance(each, cls)]
        are_scalars = not any(isinstance(each, torch.Tensor) and (each.dim() or each.requires_grad) for each in others)
        is_recorded = name.removeprefix("__").removesuffix("__") in _RECORDED
        if is_recorded and are_scalars and len(indices) == 1 and args[indices[0]]._value is None:
            index = indices[0]
            return args[index]._append(func, args[:index], args[index + 1 :], kwargs)
        return func(*_materialize_all(args), **_materialize_all(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DETACHES and isinstance(args[0], cls) and args[0]._value is None:
            return args[0]._append(torch.Tensor.detach, (), (), {})
        return func(*_materialize_all(args), **_materialize_all(kwargs or {}))


def is_called_by_deepspeed() -> bool:
    """Return True if DeepSpeed's code has called the method of a tensor whose ``__torch_function__`` asks."""
    frame = sys._getframe(2)
    # Modes that see the call first. By module: a program's folders may have these names too.
    while frame.f_back is not None and is_in(frame, "torch", "deepspeed_alst.random_draws"):
        frame = frame.f_back
    return is_in(frame, "deepspeed")


def is_in(frame: FrameType, *packages: str) -> bool:
    """Return True if a frame runs code of one of these packages."""
    return f"{frame.f_globals.get('__name__')}.".startswith(tuple(f"{each}." for each in packages))


def _materialize_all(arguments: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.materialize, arguments)


def _apply_ops(logits: torch.Tensor, ops: LogitOps) -> torch.Tensor:
    for function, before, after, keywords in ops:
        logits = function(*before, logits, *after, **keywords)
    return logits


def _split_ops(backend: str, hidden: torch.Tensor, ops: LogitOps) -> tuple[LogitTransform | None, LogitOps]:
    """Return the ops fused into the loss kernel (None without a kernel) and those left to torch."""
    if backend == "torch" or hidden.dtype == torch.float64:
        return None, ops
    try:  # Triton is optional
        from deepspeed_alst.kernels.registry import has_kernel, runs_on
    except ImportError:
        return None, ops
    use_liger = backend == "liger"
    if not runs_on(hidden.device) or not (use_liger or define_ops("cross_entropy")):
        return None, ops
    if not use_liger and not has_kernel("cross_entropy", hidden.device):
        return None, ops
    fused = fuse_ops(ops)
    if fused is None or (use_liger and fused.logit_scale != 1):
        return LogitTransform(use_liger=use_liger), ops
    return replace(fused, use_liger=use_liger), ()


def share_of_loss(
    logits: torch.Tensor | LazyLogits,
    labels_Bs: torch.Tensor,
    divisor: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Compute this rank's share of a loss, ``[B, s, V], [B, s], [] -> []``; from lazy logits in tiles."""
    if isinstance(logits, LazyLogits):
        return logits.loss(labels_Bs, divisor, label_smoothing)
    return shard_loss(logits.flatten(0, -2), labels_Bs.flatten(), divisor, label_smoothing)

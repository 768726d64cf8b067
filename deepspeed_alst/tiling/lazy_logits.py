"""Deferred logits, materialized at first use; the loss computes them one tile at a time.

A causal language model calls its head, applies a few ops to the logits (a scale, a soft cap), and passes them to its
loss. While a forward has labels, the head returns ``LazyLogits``, which record these ops; the loss then runs the
head and the ops tile by tile. Code that reads the logits (evaluation metrics) gets a materialized tensor at first use.
In training the model's ``outputs.logits`` is None.

Legend: B batch, s tokens of this rank's shard, T = B*s, t rows of a tile, H hidden size, V vocabulary.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.distributed.sequence_loss import shard_loss
from deepspeed_alst.errors import SetupError
from deepspeed_alst.random_draws.draw_mode import Branch, branch
from deepspeed_alst.tiling.logit_ops import Steps, on_the_way
from deepspeed_alst.tiling.loss import OnTheWay, loss_tile_rows, tiled_loss

# Elementwise ops on logits; their other arguments are scalars.
_ELEMENTWISE = {
    "mul",
    "multiply",
    "div",
    "divide",
    "true_divide",
    "truediv",
    "tanh",
    "add",
    "sub",
    "neg",
    "float",
    "to",
}
_ELEMENTWISE |= {"double", "rmul", "radd", "rsub", "rdiv", "rtruediv", "detach"}
# In-place ops and their out-of-place counterparts.
_IN_PLACE = {name: name.strip("_") for name in ("mul_", "div_", "add_", "sub_", "tanh_", "neg_")}
_IN_PLACE |= {"__imul__": "mul", "__itruediv__": "div", "__iadd__": "add", "__isub__": "sub"}
# Answered without materializing the logits.
_OF_THE_SHAPE = {"size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "__len__"}
_OF_THE_VALUES = {torch.Tensor.data.__get__, torch.Tensor.T.__get__, torch.Tensor.mT.__get__}
_VIEWS = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}
_SAMPLED = 4096


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
    snapshot: "weakref.ref[Weights] | None" = None
    """Weights since the last forward with a graph, alive while an evaluation's logits need them."""


class Weights:
    """Snapshot of a head's weights in one evaluation, for logits that are materialized after it."""

    def __init__(self, module: torch.nn.Module) -> None:
        params = list(module.parameters())
        # ZeRO-3 partitions the weights again; a rank that uses its logits alone could not all-gather them.
        self._whole = [param.detach().clone() for param in params] if hasattr(params[0], "ds_tensor") else None
        self._sample = [] if self._whole else [_sample(param) for param in params]

    def call(self, head: LazyHead, hidden_BsH: torch.Tensor) -> torch.Tensor:
        """Run the head's own forward with these weights.

        Raises:
            SetupError: the weights have been trained since.
        """
        params = list(head.module.parameters())
        if self._whole is None:
            now = [_sample(param) for param in params]
            if not all(torch.equal(a, b) for a, b in zip(now, self._sample, strict=True)):
                raise SetupError(
                    "logits of an evaluation were looked at after training went on, and would be made with other "
                    "weights (alst.tiled_logits_loss makes them at their first use). Use them before, or clone them."
                )
            return head.forward(hidden_BsH)
        before = [param.data for param in params]
        try:
            for param, weight in zip(params, self._whole, strict=True):
                param.data = weight
            return head.forward(hidden_BsH)
        finally:
            for param, data in zip(params, before, strict=True):
                param.data = data


class LazyLogits(torch.Tensor):
    """Lazy ``[B, s, V]`` logits; any op not known to be elementwise materializes them."""

    @staticmethod
    def __new__(cls, head: LazyHead, hidden_BsH: torch.Tensor, *args: Any) -> "LazyLogits":
        """Create a tensor with a shape and no storage."""
        weight = next(param for param in head.module.parameters() if param.dim() > 1 or hasattr(param, "ds_shape"))
        vocab = getattr(head.module, "out_features", None) or getattr(weight, "ds_shape", weight.shape)[0]
        steps = args[0] if args else ()
        dtype = _after(hidden_BsH.new_empty(0), steps).dtype
        shape = (*hidden_BsH.shape[:-1], vocab)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden_BsH.device)

    def __init__(
        self,
        head: LazyHead,
        hidden_BsH: torch.Tensor,
        steps: Steps = (),
        weights: Weights | None = None,
        drawing: Branch | None = None,
    ) -> None:
        self._head, self._hidden, self._steps, self._weights = head, hidden_BsH, steps, weights
        self._drawing = branch() if drawing is None else drawing
        self._made: torch.Tensor | None = None

    def loss(self, labels_Bs: torch.Tensor, divisor: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """Sum the cross-entropy of the labelled tokens and divide it, ``[B, s], [] -> []``."""
        head, vocab = self._head, self.shape[-1]
        params = list(head.module.parameters())
        head.is_tiled = True
        kernel, steps = _kernel_of(head, self._hidden, self._steps)

        def work(hidden_TH: torch.Tensor) -> torch.Tensor:
            if not torch.is_grad_enabled():
                self._weights = _weights_now(head)
            rows = loss_tile_rows(head.budget, vocab, in_place=kernel is not None and not steps)
            labels_T = labels_Bs.flatten().to(hidden_TH.device)
            scale = 1 / divisor.to(hidden_TH.device)
            return tiled_loss(
                lambda tile: _after(head.forward(tile), steps),
                params,
                hidden_TH,
                labels_T,
                scale,
                rows,
                label_smoothing,
                kernel,
                self._drawing,
            )

        return self._call(work, self._hidden.flatten(0, -2))

    def make(self) -> torch.Tensor:
        """Materialize the logits, ``[B, s, V]``.

        Raises:
            SetupError: the logits are an evaluation's, and the weights have been trained since.
        """
        if self._made is None:
            with self._drawing():
                if self._weights is not None:
                    logits = self._weights.call(self._head, self._hidden)
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

    def _again(self, steps: Steps) -> "LazyLogits":
        return LazyLogits(self._head, self._hidden, steps, self._weights, self._drawing)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name in _OF_THE_SHAPE or name == "__set__" or (name == "__get__" and func not in _OF_THE_VALUES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        own = [each for each in args if isinstance(each, cls)]
        if name == "contiguous" and len(own) == 1:
            return own[0]
        others = [each for each in (*args, *kwargs.values()) if not isinstance(each, cls)]
        is_plain = not any(isinstance(each, torch.Tensor) and (each.dim() or each.requires_grad) for each in others)
        if len(own) == 1 and is_plain and own[0]._made is None:
            place = next(index for index, each in enumerate(args) if each is own[0])
            around = args[:place], args[place + 1 :], kwargs
            if name in _IN_PLACE and place == 0:
                own[0]._steps = (*own[0]._steps, (getattr(torch.Tensor, _IN_PLACE[name]), *around))
                return own[0]
            if name.strip("_") in _ELEMENTWISE:
                return own[0]._again((*own[0]._steps, (func, *around)))
        return func(*_made(args), **_made(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _VIEWS and isinstance(args[0], cls) and args[0]._made is None:
            return args[0]._again((*args[0]._steps, (torch.Tensor.detach, (), (), {})))
        return func(*_made(args), **_made(kwargs or {}))


def _made(arguments: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.make, arguments)


def _after(logits: torch.Tensor, steps: Steps) -> torch.Tensor:
    for function, before, after, keywords in steps:
        logits = function(*before, logits, *after, **keywords)
    return logits


def _kernel_of(head: LazyHead, hidden: torch.Tensor, steps: Steps) -> tuple[OnTheWay | None, Steps]:
    """Return the logit ops fused into the loss kernel, None without a kernel, and the steps left to torch."""
    if head.budget.backend == "torch" or hidden.dtype == torch.float64:
        return None, steps
    try:  # Triton is imported on demand: not every system has it
        import deepspeed_alst.kernels.cross_entropy  # noqa: F401
        from deepspeed_alst.kernels.registry import has_kernel, runs_on
    except ImportError:
        return None, steps
    by_liger = head.budget.backend == "liger" and runs_on(hidden.device)
    if not by_liger and not has_kernel("cross_entropy", hidden.device):
        return None, steps
    fused = on_the_way(steps)
    if fused is None or (by_liger and fused.logit_scale != 1):
        return OnTheWay(by_liger=by_liger), steps
    return replace(fused, by_liger=by_liger), ()


def _weights_now(head: LazyHead) -> Weights:
    """Return the weights of this evaluation, one object for all its forwards."""
    weights = head.snapshot() if head.snapshot is not None else None
    if weights is None:
        weights = Weights(head.module)
        head.snapshot = weakref.ref(weights)
    return weights


def _sample(param: torch.Tensor) -> torch.Tensor:
    """Sample elements across a weight: an optimizer step changes nearly all elements of a head's."""
    flat = param.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLED)].clone()


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

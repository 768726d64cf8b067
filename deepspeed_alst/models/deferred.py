"""Logits that are not made before somebody looks at them: the loss looks at a tile at a time.

A causal language model calls its head, does a little to the logits (a scale, a soft cap), and hands them to its loss.
While a forward has labels, the head's call returns ``DeferredLogits``, which note what is done to them; the loss then
does all of it tile by tile. Whoever needs logits as such (an evaluation's metrics) gets a tensor of them at the first
touch. In training the model's ``outputs.logits`` is None.

Legend: B batch, s tokens of this rank's shard, T = B*s, t rows of a tile, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.blocks import TiledLossBlock
from deepspeed_alst.parallel.loss import shard_loss
from deepspeed_alst.tiling.loss import loss_tile_rows, tiled_loss

# What models do to logits one by one; its other arguments are numbers.
_ELEMENTWISE = ("mul", "multiply", "div", "divide", "true_divide", "tanh", "add", "sub", "neg", "float", "to", "double")


@dataclass
class DeferredHead:
    """The head of one model, and whether its logits are deferred just now."""

    module: torch.nn.Module
    forward: Callable[[torch.Tensor], torch.Tensor]
    """The module's own."""
    budget: TiledLossBlock
    """Of a tile's logits."""
    deferring: bool = False
    logits_wanted: bool = False
    """Whether who called the model asked for logits: they are made at the end of its forward."""
    work: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What the head's next call is to do in place of its own forward, with its weights at hand."""


class DeferredLogits:
    """Stands for ``[B, s, V]`` logits; any use that is not known to be elementwise makes them."""

    def __init__(self, head: DeferredHead, hidden_BsH: torch.Tensor, steps: tuple[Any, ...] = ()) -> None:
        self._head, self._hidden, self._steps = head, hidden_BsH, steps
        self._made: torch.Tensor | None = None

    def loss(self, labels_Bs: torch.Tensor, divisor: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        """The summed cross-entropy of the labelled tokens, divided, ``[B, s], [] -> []``."""
        head = self._head
        weights = list(head.module.parameters())

        def work(hidden_TH: torch.Tensor) -> torch.Tensor:
            rows = loss_tile_rows(head.budget, self.shape[-1])
            labels_T = labels_Bs.flatten().to(hidden_TH.device)
            scale = 1 / divisor.to(hidden_TH.device)
            return tiled_loss(
                lambda tile: self._after(head.forward(tile)), weights, hidden_TH, labels_T, scale, rows, label_smoothing
            )

        return self._call(work, self._hidden.flatten(0, -2))

    def make(self) -> torch.Tensor:
        """The logits, ``[B, s, V]``."""
        if self._made is None:
            self._made = self._after(self._call(self._head.forward, self._hidden))
        return self._made

    def _call(self, work: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
        """Call the head's module, whose hooks bring its weights, for ``work``."""
        self._head.work = work
        try:
            return self._head.module(hidden)
        finally:
            self._head.work = None

    def _after(self, logits: torch.Tensor) -> torch.Tensor:
        for function, before, after, keywords in self._steps:
            logits = function(*before, logits, *after, **keywords)
        return logits

    @property
    def shape(self) -> torch.Size:
        """Of the logits."""
        weight = next(
            param for param in self._head.module.parameters() if param.dim() > 1 or hasattr(param, "ds_shape")
        )
        vocab = getattr(self._head.module, "out_features", None) or getattr(weight, "ds_shape", weight.shape)[0]
        return torch.Size([*self._hidden.shape[:-1], vocab])

    @property
    def device(self) -> torch.device:
        """Of the logits."""
        return self._hidden.device

    def dim(self) -> int:
        """Of the logits."""
        return self._hidden.dim()

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Of the logits."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = [index for index, each in enumerate(args) if isinstance(each, cls)]
        others = [each for each in (*args, *kwargs.values()) if not isinstance(each, cls)]
        plain = not any(isinstance(each, torch.Tensor) and (each.dim() or each.requires_grad) for each in others)
        if func.__name__ in _ELEMENTWISE and len(places) == 1 and plain:
            own = args[places[0]]
            step = func, args[: places[0]], args[places[0] + 1 :], kwargs
            return cls(own._head, own._hidden, (*own._steps, step))
        made = [each.make() if isinstance(each, cls) else each for each in args]
        return func(*made, **{key: each.make() if isinstance(each, cls) else each for key, each in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        # Not of what every object has, so that copying and pickling do not make logits.
        if name.startswith("_"):
            raise AttributeError(name)
        method = getattr(torch.Tensor, name, None)
        if name in _ELEMENTWISE and method is not None:
            return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)
        return getattr(self.make(), name)

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return torch.sub(self, other)

    def __neg__(self) -> Any:
        return torch.neg(self)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.make()[index]

    def __len__(self) -> int:
        return self.shape[0]


def share_of_loss(
    logits: torch.Tensor | DeferredLogits,
    labels_Bs: torch.Tensor,
    divisor: torch.Tensor,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """This rank's share of a loss, ``[B, s, V], [B, s], [] -> []``; deferred logits go through it tile by tile."""
    if isinstance(logits, DeferredLogits):
        return logits.loss(labels_Bs, divisor, label_smoothing)
    return shard_loss(logits.flatten(0, -2), labels_Bs.flatten(), divisor, label_smoothing)

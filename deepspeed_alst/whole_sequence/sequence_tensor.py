"""Tensor subclass of a whole sequence, of which each rank stores the rows of its own tokens.

A program that makes its own loss gets its logits and hidden states as such, with the shapes of SP 1. Ops that treat
tokens one by one run on the shard; what has no more numbers than tokens (log-probabilities, entropies, the last token's
values) is gathered, with its gradient, into a plain tensor, the same on all ranks. Any other op gets the whole tensor,
within a limit of bytes.

Legend: B batch, S whole sequence, n rows of this rank, lead the dims of tokens, trail those behind them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from deepspeed_alst.errors import DataError
from deepspeed_alst.tiling.lazy_logits import is_called_by_deepspeed
from deepspeed_alst.whole_sequence import token_functions as functions
from deepspeed_alst.whole_sequence.token_rows import Places, Recorded, Row, Tokens, run_on_rows

_MAX_BYTES = 2 * 2**30
_UNKNOWN_GRAPH = (
    "an autograd.Function, reentrant checkpoint or vmap was called with a tensor of the whole sequence, whose gradient "
    "would be lost. Call it with deepspeed_alst.gather_sequence(tensor), or use torch's own functions"
)
_DETACHES = {torch.ops.aten.detach.default, torch.ops.aten.alias.default}


class SequenceTensor(torch.Tensor):
    """Tensor ``[*lead, *trail]``, held as this rank's rows ``[n, *trail]``; ops on it are collective."""

    @staticmethod
    def __new__(cls, rows: torch.Tensor | Recorded, places: Places) -> "SequenceTensor":
        """Create a tensor without storage."""
        shape = (*places.index.shape, *rows.shape[1:])
        needs_grad = rows.requires_grad and torch.is_grad_enabled()
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=rows.dtype, device=rows.device, requires_grad=needs_grad
        )

    def __init__(self, rows: torch.Tensor | Recorded, places: Places) -> None:
        self.rows, self.places = rows, places
        self.is_shared = False
        """True if another tensor shows the same rows, which an in-place op would have to change too."""
        self.of_head: tuple[Any, torch.Tensor] | None = None
        """Rows as a multimodal model's head made them, and their lazy logits."""
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad:
                self.register_hook(_refuse_gradient)

    @classmethod
    def of_batch(cls, rows: torch.Tensor | Recorded, tokens: Tokens, index_BS: torch.Tensor) -> "SequenceTensor":
        """Wrap the rows of a batch's tokens, ``[n, ...]``, as ``[B, S, ...]``."""
        return cls(rows, Places(tokens, index_BS))

    def whole(self, name: str = "whole", limit: float = _MAX_BYTES) -> torch.Tensor:
        """Gather all rows, ``[*lead, *trail]``, with their gradient. Collective over the sequence's ranks.

        Raises:
            DataError: it would exceed the limit of bytes.
        """
        if (num_bytes := self.numel() * self.dtype.itemsize) > limit:
            raise DataError(
                f"{name} needs a tensor of shape {list(self.shape)} whole on each rank, {num_bytes / 2**30:.1f} GiB, "
                f"more than {limit / 2**30:.0f} GiB: it is not known to treat tokens one by one. Reduce it to a few "
                "numbers of a token first (log_softmax and gather, logsumexp, topk, sum over the last dim), or use "
                "outputs.loss or deepspeed_alst.log_probs"
            )
        return self.places.gather(self.computed_rows())

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Return class, shape and dtype: the values are on other ranks."""
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype})"

    def __format__(self, spec: str) -> str:
        """Return ``repr``, for the same reason."""
        return repr(self)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        """Return the whole tensor's copy."""
        return self.whole("copy.deepcopy").detach().clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name in ("__get__", "__set__"):
            attribute = func.__self__.__name__
            if name == "__get__" and attribute == "data":
                return args[0].detach()
            if name == "__set__" or attribute not in ("T", "mT", "H", "mH", "real", "imag"):
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
        if name in ("detach", "register_hook") and is_called_by_deepspeed():
            # ZeRO 3 detaches inputs and outputs of modules in an autograd function, whose graph the rows do not have.
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs) if name != "detach" else cls(args[0].rows, args[0].places)
        if name in functions.SHAPE_QUERIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name in functions.REFUSED:
            raise DataError(f"{name} is not available on a tensor of the whole sequence; use it on a plain tensor")
        if functions.draws(name, args, kwargs):
            raise DataError(
                f"{name} on a tensor of the whole sequence would draw other random numbers on each rank; leave it out, "
                "or put it into the model"
            )
        given = [each for each in tree_iter((args, kwargs)) if isinstance(each, cls)]
        with torch._C.DisableTorchFunctionSubclass():
            if any(each.grad_fn is not None and not each.rows.requires_grad for each in given):
                raise DataError(_UNKNOWN_GRAPH)  # what an autograd.Function returned
        first = next((each for each in given if each.rows.requires_grad), given[0])  # not a teacher's
        found = functions.apply(first, func, args, kwargs)
        if found is NotImplemented:
            if functions.is_in_place(name):
                raise DataError(
                    f"{name} would change a tensor of the whole sequence in place, which is not supported: use the op "
                    "that returns a new tensor"
                )
            args, kwargs = tree_map_only(cls, lambda x: x.whole(name), (args, kwargs))
            return func(*args, **kwargs)
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DETACHES and isinstance(args[0], cls):
            return args[0].like(run_on_rows(torch.detach, Row(args[0].rows), grad=False))
        args, kwargs = tree_map_only(cls, lambda x: x.whole(str(func)), (args, kwargs or {}))
        return func(*args, **kwargs)

    # --- for token_functions.py

    @property
    def num_lead(self) -> int:
        """Number of dims of tokens, the first ones."""
        return self.places.index.dim()

    def computed_rows(self) -> torch.Tensor:
        """Return this rank's rows, ``[n, *trail]``, computed if they are recorded."""
        return self.rows.evaluate(self.places.of_rows) if isinstance(self.rows, Recorded) else self.rows

    def like(self, rows: Any) -> Any:
        """Return what a function of this tensor's tokens found: plain if it has no more numbers than tokens."""
        return tree_map(lambda each: _settled(each, self.places), rows)

    def at(self, change: Callable[[torch.Tensor], Any]) -> Any:
        """Return this tensor with its dims of tokens changed as ``change`` changes a tensor ``[*lead]``."""
        tokens = self.places.tokens
        return tree_map(lambda index: _settled(self.rows, Places(tokens, index)), change(self.places.index))

    def operand(self, x: Any) -> Any:
        """Return an operand of an elementwise op as rows; None if it has other tokens."""
        if not isinstance(x, torch.Tensor):
            return x
        lead = self.num_lead
        if isinstance(x, SequenceTensor):
            return Row(x.rows) if x.dim() == self.dim() and x.places.same(self.places) else None
        if x.dim() <= self.dim() - lead:
            return self.places.tokens.replicated(x)
        if x.dim() > self.dim():
            return None
        x = x.reshape(*[1] * (self.dim() - x.dim()), *x.shape)
        if any(size not in (1, own) for size, own in zip(x.shape[:lead], self.shape[:lead], strict=True)):
            return None
        if x.shape[:lead].numel() == 1 and self.places.index.numel() > 1:
            return self.places.tokens.replicated(x.reshape(x.shape[lead:]))
        rows = self.places.rows_of(x.to(self.device))
        return None if rows is None else Row(rows)

    def rows_and(self, arguments: Any) -> Any:
        """Return a tree of arguments with all operands as rows; NotImplemented if one has other tokens."""
        found = tree_map(self.operand, arguments)
        operands = zip(tree_iter(arguments), tree_iter(found, is_leaf=lambda x: x is None), strict=False)
        return NotImplemented if any(x is not None and row is None for x, row in operands) else found

    def sum_to(self, element_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Sum the rows of each id, ``[*lead] -> [count, *trail]``, over all ranks."""
        rows, of_rows = self.computed_rows(), self.places.of_rows
        assert of_rows is not None
        chosen = (of_rows >= 0).nonzero().flatten()
        ids = element_ids.flatten()[of_rows[chosen]]
        total = rows.new_zeros((count, *rows.shape[1:])).index_add(0, ids, rows[chosen])
        return self.places.tokens.sum_over_ranks(total)

    def replace(self, other: "SequenceTensor") -> "SequenceTensor":
        """Take another tensor's rows in an in-place op."""
        self.rows = other.rows
        return self


def _refuse_gradient(grad: torch.Tensor) -> None:
    raise DataError(_UNKNOWN_GRAPH)


def _settled(rows: torch.Tensor | Recorded, places: Places) -> torch.Tensor:
    """Return rows as a plain tensor if it has no more elements than the batch has tokens."""
    tokens = places.tokens
    is_plain = places.index.numel() * rows.shape[1:].numel() <= tokens.batch * tokens.shard * tokens.groups.sp_size
    if isinstance(rows, Recorded) and (is_plain or rows.is_few):
        rows = rows.evaluate(places.of_rows)
    if isinstance(rows, torch.Tensor) and (is_plain or rows.dim() == 1):
        return places.gather(rows)
    return SequenceTensor(rows, places)


def gather_sequence(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the whole sequence as a plain one, ``[B, S, ...]``, with its gradient; any size.

    Under sequence parallelism, what a training forward of a whole batch returns (``shard_dataloader(..., whole=True)``,
    a Trainer's own loss) is held as shards. Collective over the ranks of the sequence. A plain tensor is returned as it
    is.
    """
    return tensor.whole("gather_sequence", float("inf")) if isinstance(tensor, SequenceTensor) else tensor

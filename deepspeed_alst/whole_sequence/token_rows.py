"""Rows of a whole batch's tokens: where they are, their gathering, and functions of logits that run in tiles.

Legend: B batch, S tokens of the whole padded sequence, s = S/P one shard, n = B*s rows of this rank, t rows of a tile,
V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only, tree_unflatten

from deepspeed_alst.distributed.collectives import name_missing_ranks
from deepspeed_alst.distributed.gather import gather_tokens
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import DataError
from deepspeed_alst.tiling.lazy_logits import LazyLogits

# Recorded values are computed once they are this many times fewer than the logits.
_MIN_LOGITS_PER_VALUE = 8


@dataclass(frozen=True)
class Tokens:
    """Tokens of one whole batch, ``[B, S]``, of which each rank of a sequence has a shard ``[B, s]``."""

    groups: SequenceGroups
    batch: int
    shard: int
    note_loss: Callable[[torch.Tensor], None]
    """Called with what is gathered, of which a loss may be made."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Gather all tokens' rows, with their gradient: ``[n, ...] -> [B*S, ...]``."""
        with name_missing_ranks(self.groups.roll_group):
            whole = gather_tokens(rows.reshape(self.batch, self.shard, *rows.shape[1:]), self.groups.sp_group)
        self.note_loss(whole)
        return whole.flatten(0, 1)

    def sum_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks of the sequence, with the gradient: ``[...] -> [...]``."""
        with name_missing_ranks(self.groups.roll_group):
            total = gather_tokens(x[None, None], self.groups.sp_group).sum((0, 1)).to(x.dtype)
        self.note_loss(total)
        return total

    def replicated(self, x: torch.Tensor) -> torch.Tensor:
        """Return an operand that all tokens use, ``[...] -> [...]``, whose gradient is that of all ranks' tokens."""
        return replicated(x, self.groups)


class Places:
    """Token of each element of a tensor's leading dims: ``index`` is ``[*lead]``, of ``b * S + place``."""

    def __init__(self, tokens: Tokens, index: torch.Tensor) -> None:
        self.tokens, self.index = tokens, index

    @cached_property
    def of_rows(self) -> torch.Tensor | None:
        """Element of ``index`` of each row of this rank, -1 if it is not in it, ``[n]``; None if a token is twice."""
        tokens, index = self.tokens, self.index.flatten()
        S = tokens.shard * tokens.groups.sp_size
        element = index.new_full((tokens.batch * S,), -1)
        element[index] = torch.arange(len(index), device=index.device)
        if int((element >= 0).sum()) != len(index):
            return None
        start = tokens.groups.sp_rank * tokens.shard
        return element.view(tokens.batch, S)[:, start : start + tokens.shard].flatten()

    def rows_of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return this rank's rows of a whole tensor, ``[*lead, ...] -> [n, ...]``; None if a token is twice."""
        if self.of_rows is None:
            return None
        trail = x.shape[self.index.dim() :]
        flat = x.expand(*self.index.shape, *trail).reshape(self.index.numel(), *trail)
        return _OwnRows.apply(flat, self.of_rows.clamp(min=0), self.of_rows >= 0, self.tokens)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Gather rows into a whole tensor, ``[n, ...] -> [*lead, ...]``. Collective over the sequence's ranks."""
        if self.of_rows is None or len(self.of_rows) < self.index.numel():
            return self.tokens.gather(rows)[self.index]
        # Of few tokens, as each row's last, only theirs.
        found = rows.new_zeros((self.index.numel(), *rows.shape[1:]))
        present = (self.of_rows >= 0).nonzero().flatten()
        found = found.index_copy(0, self.of_rows[present], rows[present])
        return self.tokens.sum_over_ranks(found).reshape(*self.index.shape, *rows.shape[1:])

    def same(self, other: "Places") -> bool:
        """Return True if both have the same tokens at the same elements."""
        if other is self:
            return True
        one, two = self.tokens, other.tokens  # those of a teacher and its student are equal
        same = (one.groups.ranks, one.batch, one.shard) == (two.groups.ranks, two.batch, two.shard)
        return same and torch.equal(other.index, self.index)


class _OwnRows(torch.autograd.Function):
    """``[N, ...] -> [n, ...]``; a whole tensor has the same gradient on all ranks, that of all ranks' rows."""

    @staticmethod
    def forward(
        ctx: Any, flat: torch.Tensor, places: torch.Tensor, present: torch.Tensor, tokens: Tokens
    ) -> torch.Tensor:
        ctx.save_for_backward(places, present)
        ctx.tokens, ctx.shape = tokens, flat.shape
        return flat[places]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        places, present = ctx.saved_tensors
        total = grad.new_zeros(ctx.shape).index_add_(0, places[present], grad[present])
        return _mean_over_ranks(total, ctx.tokens.groups), None, None, None


def replicated(x: torch.Tensor, groups: SequenceGroups) -> torch.Tensor:
    """Return a tensor that all ranks of a sequence have, ``[...] -> [...]``, with the gradient of all its ranks."""
    return _Replicated.apply(x, groups) if x.requires_grad else x


class _Replicated(torch.autograd.Function):
    """Identity; the gradient is the same on all ranks, that of all ranks' rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: SequenceGroups) -> torch.Tensor:
        ctx.groups = groups
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _mean_over_ranks(grad.clone(), ctx.groups), None


def _mean_over_ranks(grad: torch.Tensor, groups: SequenceGroups) -> torch.Tensor:
    """Average the ranks' gradients, in place: each is P times that of its own rows (sequence_loss.py)."""
    with name_missing_ranks(groups.roll_group):
        torch.distributed.all_reduce(grad, group=groups.sp_group)
    return grad.div_(groups.sp_size)


class Recorded:
    """A function of each token's logits, ``[n, *trail]``, that runs in the tiles of the loss."""

    def __init__(self, function: Callable[..., Any], arguments: Any, probe: torch.Tensor, grad: bool = True) -> None:
        self._function, self._arguments = function, arguments
        # It runs later, where the mode may be another. A comparison or an index has no gradient.
        self._grad = grad and torch.is_grad_enabled() and probe.dtype.is_floating_point
        self.shape, self.dtype, self.device = probe.shape, probe.dtype, probe.device

    @classmethod
    def of_logits(cls, logits: LazyLogits) -> "Recorded":
        """Record the logits themselves, ``[n, V]``."""
        with FakeTensorMode():
            probe = torch.empty((1, logits.shape[-1]), dtype=logits.dtype, device=logits.device)
        return cls(lambda x: x, (Row(logits),), probe)

    @property
    def requires_grad(self) -> bool:
        """True if its values have a gradient."""
        rows = [each.value for each in tree_iter(self._arguments) if isinstance(each, Row)]
        return self._grad and any(map(_requires_grad, rows))

    @property
    def is_few(self) -> bool:
        """True if its values are few beside the logits."""
        vocab = max(each.shape[-1] for each in self._sources() if isinstance(each, LazyLogits))
        return self.shape[1:].numel() * _MIN_LOGITS_PER_VALUE <= vocab

    def evaluate(self, of_rows: torch.Tensor | None) -> torch.Tensor:
        """Compute its values in tiles, ``[n, *trail]``; zeros where ``of_rows`` is negative."""
        sources = {id(each): each for each in self._sources()}.values()
        logits = [each for each in sources if isinstance(each, LazyLogits)]
        main = next((each for each in logits if _requires_grad(each)), logits[0])
        others = [each for each in logits if each is not main]
        if any(map(_requires_grad, others)):
            raise DataError(
                "logits of two forwards were used in one expression, both with a gradient. Reduce each to numbers of a "
                "token first (log_softmax and gather, logsumexp), or compute one under torch.no_grad()"
            )
        rows = [each for each in sources if isinstance(each, torch.Tensor) and not isinstance(each, LazyLogits)]
        given = [*(each.hidden_rows() for each in others), *(each.reshape(len(each), -1) for each in rows)]

        # The graph keeps ``of_tile``, which must not keep the logits, whose memory is freed in the backward.
        key, run, num_values = id(main), self._program(), self.shape[1:].numel()
        places = [(id(each), each if isinstance(each, LazyLogits) else each.shape[1:]) for each in (*others, *rows)]

        def of_tile(logits_tV: torch.Tensor, *tiles: torch.Tensor) -> torch.Tensor:
            values = {key: logits_tV}
            for (place, each), tile in zip(places, tiles, strict=True):
                values[place] = each.of_hidden(tile) if isinstance(each, LazyLogits) else tile.view(len(tile), *each)
            return run(values).reshape(len(logits_tV), num_values)

        chosen = None if of_rows is None or bool((of_rows >= 0).all()) else (of_rows >= 0).nonzero().flatten()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.requires_grad):
            found = main.of_tokens(of_tile, *given, chosen=chosen)
        return found.view(len(found), *self.shape[1:])

    def _sources(self) -> list[torch.Tensor]:
        rows = [each.value for each in tree_iter(self._arguments) if isinstance(each, Row)]
        return [source for each in rows for source in (each._sources() if isinstance(each, Recorded) else [each])]

    def _program(self) -> Callable[[dict[int, torch.Tensor]], torch.Tensor]:
        """Return a function of its sources' values, by ``id``, that refers to none of them."""
        steps = dict[int, tuple[Callable[..., Any], Any, bool]]()

        def visit(each: Recorded) -> None:
            for row in tree_iter(each._arguments):
                if isinstance(row, Row) and isinstance(row.value, Recorded) and id(row.value) not in steps:
                    visit(row.value)
            arguments = tree_map_only(Row, lambda row: _Value(id(row.value)), each._arguments)
            steps[id(each)] = each._function, arguments, each._grad

        def run(values: dict[int, torch.Tensor]) -> torch.Tensor:
            for place, (function, arguments, grad) in steps.items():
                given = tree_map_only(_Value, lambda value: values[value.place], arguments)
                given = given if grad else tree_map_only(torch.Tensor, torch.Tensor.detach, given)
                with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
                    values[place] = function(*given)
            return values[place]

        visit(self)
        return run


@dataclass(frozen=True)
class Row:
    """An argument with a row for each token of this rank: a tensor ``[n, ...]``, lazy logits, or what is recorded."""

    value: torch.Tensor | Recorded


@dataclass(frozen=True)
class _Value:
    """An argument that is the value of a row's source in a tile."""

    place: int


def run_on_rows(function: Callable[..., Any], *arguments: Any, grad: bool = True) -> Any:
    """Run a function of tokens on rows, or record it: results are ``[n, ...]`` tensors, or ``Recorded``, in a tree.

    ``grad`` is False for one that has no gradient, as ``detach``.
    """
    rows = [each.value for each in tree_iter(arguments) if isinstance(each, Row)]
    if not any(isinstance(each, Recorded) for each in rows):
        return function(*tree_map_only(Row, lambda row: row.value, arguments))

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        probes = function(*tree_map_only(Row, _probe, arguments))
    flat, spec = tree_flatten(probes)
    picked = [
        Recorded(lambda *given, place=place: tree_flatten(function(*given))[0][place], arguments, each, grad)
        for place, each in enumerate(flat)
    ]
    return tree_unflatten(picked, spec)


def _requires_grad(x: Any) -> bool:
    return x.has_grad if isinstance(x, LazyLogits) else x.requires_grad


def _probe(row: Row) -> torch.Tensor:
    return torch.empty((1, *row.value.shape[1:]), dtype=row.value.dtype, device=row.value.device)

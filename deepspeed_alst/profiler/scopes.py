"""Lookup of the running module: by hooks in forward, by autograd's sequence numbers in backward.

Every autograd node has a number, in forward order. A mark stores the first number of a scope, so the scope of a node in
the backward is found by its number. The numbers are a thread's own: forward and backward must run in one thread.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from deepspeed_alst.profiler.owners import Category

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"
# Attribute names or class name suffixes of transformers models and most others.
_HEADS = ("lm_head", "embed_out", "output_projection")
_ATTENTION = re.compile(r"(self_)?(attn|attention)|.*(attention|attn)\d?", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|block_sparse_moe|experts|.*(mlp|feedforward|moeblock|experts)", re.I)


class Scope(NamedTuple):
    """Scope of running code. Without a category, memory inherits its inputs' owner."""

    category: Category | None
    module: str


_OUTSIDE = Scope(None, "")


class _Entry:
    """Scope that was entered and not left; ``node`` is the autograd node running then, if any."""

    def __init__(self, holder: object, scope: Scope) -> None:
        self.holder, self.scope, self.node = holder, scope, torch._C._current_autograd_node()


class Scopes:
    """Stack of open scopes, and marks: scopes by their first sequence number."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = {id(module): _scope_of(path, module) for path, module in model.named_modules()}
        self._parameters = {id(param): name for name, param in model.named_parameters()}
        self._open: list[_Entry] = []
        self._numbers: list[int] = []
        self._marked: list[Scope] = []

    def enter_module(self, module: torch.nn.Module) -> None:
        """Enter a module's forward; without its own category it inherits the enclosing one, or else is ``residual``."""
        around, _ = self.now()
        known = self._modules.get(id(module))
        category, path = known or Scope(None, around.module)
        # A program may call the decoder without the model around it, as DeepSpeed's tiled loss requires.
        self._enter(module, Scope(category or around.category or ("residual" if known else None), path))

    def leave_module(self, module: torch.nn.Module) -> None:
        """Leave a module, also after an exception. After the head, the enclosing module computes logits and loss."""
        self._leave(module)
        is_head = self._modules.get(id(module), _OUTSIDE).category == "logits"
        if is_head and self._open and self._open[-1].scope.category in (None, "residual"):
            self._open[-1].scope = self._open[-1].scope._replace(category="logits")
            self._mark(self.now()[0])

    @contextmanager
    def owner(self, category: Category) -> Iterator[None]:
        """Give allocations inside this owner."""
        holder = object()
        self._enter(holder, Scope(category, self.now()[0].module))
        try:
            yield
        finally:
            self._leave(holder)

    def now(self) -> tuple[Scope, str]:
        """Return the current scope and the part of the step."""
        node = torch._C._current_autograd_node()
        top = self._open[-1] if self._open else None
        if node is None:
            return (top.scope if top else _OUTSIDE), FORWARD
        builds_graph = torch.is_grad_enabled()
        if top is not None and top.node is node:
            # An owner set inside a backward does not make it a recomputation; a module does.
            in_module = any(each.node is node and isinstance(each.holder, torch.nn.Module) for each in self._open)
            return top.scope, RECOMPUTE if builds_graph or in_module else BACKWARD
        if (parameter := self._parameter_of(node)) is not None:
            scope = Scope("gradients", parameter)
        else:
            place = bisect_right(self._numbers, node._sequence_nr())
            scope = self._marked[place - 1] if place else _OUTSIDE
        if builds_graph:
            # The operator's own node already has its number.
            self._mark(scope, torch.autograd._get_sequence_nr() - 1)
        return scope, RECOMPUTE if builds_graph else BACKWARD

    def accumulates(self) -> bool:
        """Return True if autograd is accumulating the gradient of a model parameter."""
        node = torch._C._current_autograd_node()
        return node is not None and self._parameter_of(node) is not None

    def close(self) -> None:
        """Drop references to the model's graph."""
        self._open.clear()

    def _enter(self, holder: object, scope: Scope) -> None:
        self._open.append(_Entry(holder, scope))
        self._mark(scope)

    def _leave(self, holder: object) -> None:
        """Leave a scope and those above it, which an exception left without their hooks."""
        place = next((at for at, entry in reversed([*enumerate(self._open)]) if entry.holder is holder), None)
        if place is not None:
            del self._open[place:]
            self._mark(self.now()[0])

    def _mark(self, scope: Scope, number: int | None = None) -> None:
        number = torch.autograd._get_sequence_nr() if number is None else number
        while self._numbers and self._numbers[-1] >= number:
            self._numbers.pop()
            self._marked.pop()
        if not self._marked or self._marked[-1] != scope:
            self._numbers.append(number)
            self._marked.append(scope)

    def _parameter_of(self, node: Any) -> str | None:
        """Return the name of the parameter whose gradient a node accumulates, or None."""
        return self._parameters.get(id(getattr(node, "variable", None)))


def _scope_of(path: str, module: torch.nn.Module) -> Scope:
    """Return the category that a module starts, or None to inherit, and its path."""
    name, kind = path.rsplit(".", 1)[-1], type(module).__name__
    own: Category | None = None
    if name in _HEADS:
        own = "logits"
    elif any(map(_ATTENTION.fullmatch, (name, kind))):
        own = "attention"
    elif any(map(_MLP.fullmatch, (name, kind))):
        own = "tiles"
    return Scope(own, path or kind)

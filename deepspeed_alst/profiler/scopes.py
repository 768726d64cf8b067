"""Lookup of the running module: by hooks in forward, by autograd's sequence numbers in backward.

Every autograd node has a number, in forward order. A mark stores the first number of a scope, so the scope of a node in
the backward is found by its number.
"""

import re
import sys
import threading
from bisect import bisect_right
from typing import Any, NamedTuple

import torch
from torch.utils import checkpoint

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


OUTSIDE = Scope(None, "")


class _Entry:
    """Scope that was entered and not left; ``node`` is the autograd node running then, if any."""

    def __init__(self, holder: object, scope: Scope) -> None:
        self.holder, self.scope = holder, scope
        self.node = torch._C._current_autograd_node()
        # An owner set inside a backward does not make it a recomputation; a module or a checkpoint does.
        self.recomputes = self.node is not None and (isinstance(holder, torch.nn.Module) or _called_by_checkpoint())


class _Marks:
    """Scopes by their first sequence number, for the nodes of one thread."""

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._scopes: list[Scope] = []

    def set(self, number: int, scope: Scope) -> None:
        while self._numbers and self._numbers[-1] >= number:
            self._numbers.pop()
            self._scopes.pop()
        if not self._scopes or self._scopes[-1] != scope:
            self._numbers.append(number)
            self._scopes.append(scope)

    def find(self, number: int) -> Scope:
        place = bisect_right(self._numbers, number)
        return self._scopes[place - 1] if place else OUTSIDE


class Scopes:
    """Stack of open scopes, and the marks of their nodes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._scopes = _scopes_of(model)
        self._heads = _heads_of(model)
        self._parameters = {id(param): name for name, param in model.named_parameters()}
        self._open: list[_Entry] = []
        self._marks: dict[int, _Marks] = {}
        self._marked_last = threading.get_ident()
        self._threads: dict[int, int] = {}

    def enter_module(self, module: torch.nn.Module) -> None:
        """Enter a module's forward; without its own category it inherits the enclosing one."""
        around, _ = self.now()
        category, path = self._scopes.get(id(module), (None, around.module))
        self._enter(module, Scope(category or around.category, path))

    def leave_module(self, module: torch.nn.Module) -> None:
        """Leave a module, also after an exception. After the head, the enclosing module computes logits and loss."""
        self._leave(module)
        if id(module) in self._heads and self._open:
            entry = self._open[-1]
            if entry.scope.category in (None, "residual"):
                entry.scope = entry.scope._replace(category="logits")
                self._mark(self.now()[0])

    def enter_owner(self, holder: object, category: Category) -> None:
        """Enter a scope with an explicit owner."""
        self._enter(holder, Scope(category, self.now()[0].module))

    def leave_owner(self, holder: object) -> None:
        """Leave the scope of ``enter_owner``."""
        self._leave(holder)

    def now(self) -> tuple[Scope, str]:
        """Return the current scope and the part of the step."""
        node = torch._C._current_autograd_node()
        top = self._open[-1] if self._open else None
        if node is None:
            return (top.scope if top else OUTSIDE), FORWARD
        builds_graph = torch.is_grad_enabled()
        if top is not None and top.node is node:
            recomputes = any(entry.recomputes for entry in self._open if entry.node is node)
            return top.scope, RECOMPUTE if builds_graph or recomputes else BACKWARD
        scope = self._scope_of(node)
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
        for place in range(len(self._open) - 1, -1, -1):
            if self._open[place].holder is holder:
                del self._open[place:]
                self._mark(self.now()[0])
                return

    def _mark(self, scope: Scope, number: int | None = None) -> None:
        thread = self._marked_last = threading.get_ident()
        marks = self._marks.setdefault(thread, _Marks())
        marks.set(torch.autograd._get_sequence_nr() if number is None else number, scope)

    def _scope_of(self, node: Any) -> Scope:
        parameter = self._parameter_of(node)
        if parameter is not None:
            return Scope("gradients", parameter)
        # Sequence numbers are per thread, and on CUDA the backward runs in its own threads. The nodes of a backward
        # come from the thread that made the last mark before it.
        task = torch._C._current_graph_task_id()
        thread = self._threads.setdefault(task, self._marked_last)
        marks = self._marks.get(thread)
        return marks.find(node._sequence_nr()) if marks else OUTSIDE

    def _parameter_of(self, node: Any) -> str | None:
        """Return the name of the parameter whose gradient a node accumulates, or None."""
        return self._parameters.get(id(getattr(node, "variable", None)))


def _called_by_checkpoint() -> bool:
    """Return True if torch's checkpointing recomputes a forward in this thread, below the current backward."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if frame.f_globals.get("__name__") == checkpoint.__name__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _heads_of(model: torch.nn.Module) -> set[int]:
    """Return the ids of modules that produce logits."""
    return {id(module) for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in _HEADS}


def _scopes_of(model: torch.nn.Module) -> dict[int, tuple[Category | None, str]]:
    """Return by module id the category it starts, or None to inherit, and its path."""
    found: dict[int, tuple[Category | None, str]] = {}
    heads = _heads_of(model)
    for path, module in model.named_modules():
        own: Category | None = None if path else "residual"
        names = (path.rsplit(".", 1)[-1], type(module).__name__)
        if id(module) in heads:
            own = "logits"
        elif any(_ATTENTION.fullmatch(name) for name in names):
            own = "attention"
        elif any(_MLP.fullmatch(name) for name in names):
            own = "tiles"
        found[id(module)] = (own, path or type(module).__name__)
    return found

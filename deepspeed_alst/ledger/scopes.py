"""Which module runs: by hooks in forward, by autograd's sequence numbers in backward.

Every autograd node has a number, given in the order of the forward. A mark says from which number on nodes belong to
which scope, so a node that runs in backward is looked up by its number.
"""

import re
import sys
import threading
from bisect import bisect_right
from typing import Any, NamedTuple

import torch
from torch.utils import checkpoint

from deepspeed_alst.ledger.owners import Category

FORWARD, RECOMPUTE, BACKWARD = "forward", "recompute", "backward"
# How transformers' models, and most others, name a module's attribute or end the name of its class.
_HEADS = ("lm_head", "embed_out", "output_projection")
_ATTENTION = re.compile(r"(self_)?(attn|attention)|.*(attention|attn)\d?", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|block_sparse_moe|experts|.*(mlp|feedforward|moeblock|experts)", re.I)


class Scope(NamedTuple):
    """Where code runs. Without a category, memory belongs to whom its inputs belong to."""

    category: Category | None
    module: str


OUTSIDE = Scope(None, "")


class _Entry:
    """A scope that was entered and not left; ``node`` is the autograd node that ran then, if any did."""

    def __init__(self, holder: object, scope: Scope) -> None:
        self.holder, self.scope = holder, scope
        self.node = torch._C._current_autograd_node()
        # An owner that a backward names does not make it a forward; a module does, and so does a checkpoint.
        self.recomputes = self.node is not None and (isinstance(holder, torch.nn.Module) or _called_by_checkpoint())


class _Marks:
    """Scopes by the sequence number that they start at, of the nodes that one thread made."""

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
    """The scopes that are open, and the marks that their nodes were made under."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._scopes = _scopes_of(model)
        self._heads = _heads_of(model)
        self._parameters = {id(param): name for name, param in model.named_parameters()}
        self._open: list[_Entry] = []
        self._marks: dict[int, _Marks] = {}
        self._marked_last = threading.get_ident()
        self._threads: dict[int, int] = {}

    def enter_module(self, module: torch.nn.Module) -> None:
        """A module's forward starts; one without an owner of its own belongs to the one around it."""
        around, _ = self.now()
        category, path = self._scopes.get(id(module), (None, around.module))
        self._enter(module, Scope(category or around.category, path))

    def leave_module(self, module: torch.nn.Module) -> None:
        """It has ended, or an exception has ended it. After the head, the module around it makes logits and a loss."""
        self._leave(module)
        if id(module) in self._heads and self._open:
            entry = self._open[-1]
            if entry.scope.category in (None, "residual"):
                entry.scope = entry.scope._replace(category="logits")
                self._mark(self.now()[0])

    def enter_owner(self, holder: object, category: Category) -> None:
        """Somebody says who owns what comes."""
        self._enter(holder, Scope(category, self.now()[0].module))

    def leave_owner(self, holder: object) -> None:
        """The end of ``enter_owner``."""
        self._leave(holder)

    def now(self) -> tuple[Scope, str]:
        """Who runs, and in which part of the step."""
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
            # The operator's own node has got its number already.
            self._mark(scope, torch.autograd._get_sequence_nr() - 1)
        return scope, RECOMPUTE if builds_graph else BACKWARD

    def accumulates(self) -> bool:
        """Whether autograd is handing a gradient on to a parameter of the model."""
        node = torch._C._current_autograd_node()
        return node is not None and self._parameter_of(node) is not None

    def close(self) -> None:
        """Drop what refers to the model's graph."""
        self._open.clear()

    def _enter(self, holder: object, scope: Scope) -> None:
        self._open.append(_Entry(holder, scope))
        self._mark(scope)

    def _leave(self, holder: object) -> None:
        """Entries above it were left by an exception that their hooks did not see."""
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
        # Numbers are a thread's own, and on CUDA the backward has threads of its own. A backward's nodes were made by
        # the thread that made the last mark before it.
        task = torch._C._current_graph_task_id()
        thread = self._threads.setdefault(task, self._marked_last)
        marks = self._marks.get(thread)
        return marks.find(node._sequence_nr()) if marks else OUTSIDE

    def _parameter_of(self, node: Any) -> str | None:
        """The name of the parameter whose gradient a node accumulates; other leaves are none of it."""
        return self._parameters.get(id(getattr(node, "variable", None)))


def _called_by_checkpoint() -> bool:
    """Whether torch's checkpointing runs a forward again, in this thread and below the backward that runs now."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_engine_run_backward":
        if frame.f_globals.get("__name__") == checkpoint.__name__:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _heads_of(model: torch.nn.Module) -> set[int]:
    """Modules that make logits."""
    return {id(module) for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in _HEADS}


def _scopes_of(model: torch.nn.Module) -> dict[int, tuple[Category | None, str]]:
    """By id of a module: the category that it starts, None if that of the module around it goes on, and its path."""
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

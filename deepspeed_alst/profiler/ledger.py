"""Ledger of a training step: the owner of each live byte, and the operator of each FLOP.

A dispatch mode: it sees inputs and outputs of operators, real or fake, not the temporary allocations of a kernel.
torch's MemTracker names no owners and counts gradients that autograd adds in place twice (12,004 bytes for 8,004); its
FlopCounterMode finds no module inside of custom autograd functions, which tiles are.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError
from deepspeed_alst.profiler.owners import CATEGORIES, Block, Blocks, Category, Moment, Peak, Sample, Scopes, opened

aten = torch.ops.aten
# Owners that derived tensors do not inherit.
_NOT_INHERITED = ("weights", "gradients", "communication", "host")


class Spent(NamedTuple):
    """Key of the FLOP counter."""

    part: str
    category: str
    operator: str


class Ledger:
    """Ledger of one model, a context manager; readable during and after the step.

    FLOPs are by torch's formulas: a multiply-add is 2, only matmuls, convolutions and attention count, causal attention
    counts in full (all S x S scores), and its backward recomputes the scores. The model's parameters and buffers are
    the weights; module names and classes determine the owners. If it is not on the CPU, CPU memory is ``host``.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.spent: Counter[Spent] = Counter()
        """FLOPs by part of the step, category and operator."""
        first = next(model.parameters(), None)
        self._on_cpu = first is None or first.device.type == "cpu"
        self._model = model
        self._scopes = Scopes(model)
        self._blocks = Blocks()
        self._undo = PatchSet()

    def __enter__(self) -> "Ledger":
        with PatchSet().rollback_on_error() as undo:
            undo.enter_context(opened(self.owner))
            undo.callback(self._scopes.entries.clear)
            undo.callback(self._blocks.alive.clear)
            self.claim([*self._model.buffers(), *self._model.parameters()], "weights")
            self._claim_gradients()
            undo.hook(torch_modules, "module_forward_pre", lambda module, args: self._scopes.enter_module(module))
            undo.hook(torch_modules, "module_forward", self._after_module, always_call=True)
            undo.wrap(torch.UntypedStorage, "resize_", self._seen)
            # On a GPU autograd has threads of its own otherwise, and their sequence numbers are others (owners.py).
            undo.enter_context(torch.autograd.set_multithreading_enabled(False))
            undo.enter_context(_Watch(self._run))
            undo.callback(self._claim_gradients)
            self._undo = undo
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()

    def owner(self, category: Category) -> AbstractContextManager[None]:
        """Implement ``owners.owner`` for this ledger."""
        if category not in CATEGORIES:
            raise AlstError(f"owner({category!r}): no such category. Use one of {', '.join(CATEGORIES)}")
        return self._scopes.owner(category)

    def claim(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Assign an owner to existing tensors for their whole lifetime, past and future."""
        for tensor in tensors:
            if _has_storage(tensor):
                self._see(tensor, category, initial=True).claim(category)

    @property
    def timeline(self) -> list[Sample]:
        """Live bytes by category, before the first event and after each."""
        return list(self._blocks.samples())

    @property
    def peak(self) -> Peak:
        """Peak of device memory: bytes, moment and owners."""
        return self._blocks.peak()

    def flops_by(self, field: str) -> Counter[str]:
        """Sum FLOPs by a field of ``Spent``: part, category or operator."""
        found: Counter[str] = Counter()
        for spent, flops in self.spent.items():
            found[getattr(spent, field)] += flops
        return found

    @property
    def flops(self) -> Counter[str]:
        """FLOPs by operator."""
        return self.flops_by("operator")

    @property
    def attention_flops(self) -> int:
        """FLOPs of fused attention operators; scores computed by matmuls count as ``matmul_flops``."""
        return sum(flops for operator, flops in self.flops.items() if "attention" in operator)

    @property
    def matmul_flops(self) -> int:
        """FLOPs of all other operators."""
        return self.flops.total() - self.attention_flops

    def report(self) -> str:
        """Format the peak, its owners and the FLOPs as text."""
        from deepspeed_alst.profiler.picture import report

        return report(self)

    def draw(self, path: str) -> None:
        """Plot the timeline to a PNG or the format of the path's suffix; needs matplotlib."""
        from deepspeed_alst.profiler.picture import draw

        draw({"": self.timeline}, path)

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator and record its inputs, outputs and FLOPs."""
        scope, part = self._scopes.now()
        self._blocks.expect_sum_in_place([])
        moment = Moment(part, scope.module, str(getattr(func, "_overloadpacket", func)))
        self._blocks.moment = moment
        # Inputs are older than the ledger if they are new to it, unless they are the data of a new ``torch.tensor``.
        is_new = func is aten.lift_fresh.default
        given: Category = (is_new and scope.category) or "other"
        leaves = tree_leaves((args, kwargs))
        inputs = [self._see(each, given, initial=not is_new) for each in leaves if _has_storage(each)]
        result = func(*args, **kwargs)
        category = scope.category or _inherited(inputs)
        outputs = [self._see(each, category) for each in tree_leaves(result) if _has_storage(each)]
        if "c10d" in getattr(func, "namespace", ""):
            for block in inputs + outputs:
                block.claim("communication")
        elif self._scopes.accumulates():
            for block in outputs:
                block.claim("gradients")
        if len(inputs) == 2 and _adds_for_autograd(func) and outputs[0] not in inputs:
            self._blocks.expect_sum_in_place(inputs)
        if (flops_of := _formula(func)) is not None:
            flops = flops_of(*args, **kwargs, out_val=result)
            self.spent[Spent(part, category, moment.operator)] += flops
        return result

    def _see(self, tensor: torch.Tensor, category: Category, *, initial: bool = False) -> Block:
        if tensor.device.type == "cpu" and not self._on_cpu:
            category = "host"
        return self._blocks.see(tensor.untyped_storage(), category, initial=initial)

    def _claim_gradients(self) -> None:
        self.claim([param.grad for param in self._model.parameters() if param.grad is not None], "gradients")

    def _seen(self, resize: Any) -> Any:
        """Wrap ``UntypedStorage.resize_``, which is no operator."""

        def resize_(storage: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
            result = resize(storage, *args, **kwargs)
            if (block := self._blocks.find(storage)) is not None:
                self._blocks.see(storage, block.category)
            return result

        return resize_

    def _after_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        # ZeRO-3 gives a parameter its memory only while its module runs.
        self.claim(module.parameters(recurse=False), "weights")
        self._scopes.leave_module(module)


class _Watch(TorchDispatchMode):
    """Dispatch mode that passes every operator to a function, with the mode off meanwhile."""

    supports_higher_order_operators = True

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "") == "prim":
            return func(*args, **kwargs)  # query of a fake tensor, such as its device
        # Autograd decomposes operators that are made of others; inference mode does not.
        if torch.is_inference_mode_enabled() and isinstance(func, torch._ops.OpOverload) and _formula(func) is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._run(func, args, kwargs)


def _grouped_mm_flop(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    """Count a grouped matmul; groups split one of its sizes, two 3D operands are a batched matmul."""
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]


# Operators that torch's registry lacks.
_FORMULAS: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
    aten._grouped_mm: _grouped_mm_flop,
}


def _formula(func: Any) -> Any:
    """Return an operator's formula, called with its arguments and ``out_val``; None if it does not count."""
    packet = getattr(func, "_overloadpacket", func)
    return flop_registry.get(packet) or _FORMULAS.get(packet)


def _has_storage(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not is_traceable_wrapper_subclass(x) and x.layout is torch.strided


def _inherited(inputs: list[Block]) -> Category:
    """Return the largest input's owner, for operators outside modules: a loss inherits from its logits."""
    heirs = [block for block in inputs if block.category not in _NOT_INHERITED]
    return max(heirs, key=lambda block: block.num_bytes).category if heirs else "other"


def _adds_for_autograd(func: Any) -> bool:
    """Return True if autograd, not the program, is adding two gradients of one tensor.

    Autograd sums into an input whose last reference it holds; under a dispatch mode it always allocates the sum (torch
    2.13, input_buffer.cpp). It calls from C++: the next Python frame starts a backward, or none exists.
    """
    if func is not aten.add.Tensor or torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
        return False
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith((__package__, "torch._")):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is None or frame.f_code.co_name == "_engine_run_backward"

"""Ledger of a training step: the owner of each live byte, and the operator of each FLOP.

    with Ledger(model) as ledger:
        with ledger.phase("step 1"):
            model(**batch).loss.backward()
    print(ledger.report())

It is a dispatch mode: it sees the inputs and outputs of operators, on real tensors and on fake ones (enter
FakeTensorMode first), but not the temporary allocations of a kernel. All state is in its objects and in hooks that are
removed on exit: without a ledger there is no overhead.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch.nn.modules import module as torch_modules
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.profiler.blocks import Block, Blocks, Moment
from deepspeed_alst.profiler.flops import formula, is_attention
from deepspeed_alst.profiler.owners import Category, check_category, opened
from deepspeed_alst.profiler.report import report
from deepspeed_alst.profiler.scopes import Scopes
from deepspeed_alst.profiler.timeline import Peak, Sample, peak_of, samples_of
from deepspeed_alst.profiler.watch import Watch, adds_for_autograd, resizes_seen

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")
_WITH_WEIGHT = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
# Owners that derived tensors do not inherit.
_NOT_INHERITED = ("weights", "gradients", "communication", "host")


class Spent(NamedTuple):
    """Key of the FLOP counter."""

    phase: str
    part: str
    category: str
    operator: str


class Ledger:
    """Ledger of one model; readable during and after the step.

    Args:
        model: its parameters and buffers are the weights; module names and classes determine the owners.
        device_type: CPU memory of a model on another device is ``host``; default: the first parameter's device.
    """

    def __init__(self, model: torch.nn.Module, device_type: str | None = None) -> None:
        self.spent: Counter[Spent] = Counter()
        """FLOPs by phase, part of the step, category and operator."""
        self.rows: Counter[str] = Counter()
        """Rows multiplied with each linear weight in forward direction, by parameter name."""
        first = next(model.parameters(), None)
        self._device_type = device_type or (first.device.type if first is not None else "cpu")
        self._model = model
        self._phase = ""
        self._scopes = Scopes(model)
        self._blocks = Blocks()
        self._shapes: dict[str, tuple[torch.Size, tuple[int, ...]]] = {}
        self._undo = PatchSet()

    # --- interface of the program

    def __enter__(self) -> "Ledger":
        with PatchSet().rollback_on_error() as undo:
            undo.enter_context(opened(self))
            undo.callback(self._scopes.close)
            undo.callback(self._blocks.close)
            self._claim_model()
            undo.hook(torch_modules, "module_forward_pre", self._before_module)
            undo.hook(torch_modules, "module_forward", self._after_module, always_call=True)
            undo.enter_context(resizes_seen(self._seen))
            undo.enter_context(Watch(self._run))
            undo.callback(self._claim_gradients)
            self._undo = undo
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of the moments inside; an inner phase overrides an outer one."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextlib.contextmanager
    def _owner(self, category: Category) -> Iterator[None]:
        holder = object()
        self._scopes.enter_owner(holder, category)
        try:
            yield
        finally:
            self._scopes.leave_owner(holder)

    def owner(self, category: Category) -> AbstractContextManager[None]:
        """Implement ``owners.owner`` for this ledger."""
        check_category(category)
        return self._owner(category)

    def claim(self, tensors: Iterable[torch.Tensor], category: Category) -> None:
        """Assign an owner to existing tensors for their whole lifetime, past and future."""
        check_category(category)
        for tensor in tensors:
            if _has_storage(tensor):
                self._blocks.claim(self._see(tensor, category, initial=True), category)

    # --- results

    @property
    def timeline(self) -> list[Sample]:
        """Live bytes by category, before the first event and after each."""
        return list(samples_of(self._blocks.initial, self._blocks.events))

    @property
    def peak(self) -> Peak:
        """Peak of device memory: bytes, moment and owners."""
        return peak_of(self.timeline, self._blocks.initial, self._blocks.events)

    @property
    def peak_host_bytes(self) -> int:
        """Peak of host memory in bytes."""
        return max(sample.bytes["host"] for sample in self.timeline)

    @property
    def flops(self) -> Counter[str]:
        """FLOPs by operator."""
        return self.flops_by("operator")

    def flops_by(self, field: str) -> Counter[str]:
        """Sum FLOPs by a field of ``Spent``: phase, part, category or operator."""
        found: Counter[str] = Counter()
        for spent, flops in self.spent.items():
            found[getattr(spent, field)] += flops
        return found

    @property
    def attention_flops(self) -> int:
        """FLOPs of fused attention operators; scores computed by matmuls count as ``matmul_flops``."""
        return sum(flops for operator, flops in self.flops.items() if is_attention(operator))

    @property
    def matmul_flops(self) -> int:
        """FLOPs of all other operators."""
        return self.flops.total() - self.attention_flops

    def forwards(self, num_tokens: int) -> dict[str, float]:
        """Return forward passes of all tokens per linear weight, recomputation and tiles included."""
        return {name: rows / num_tokens for name, rows in self.rows.items()}

    def report(self) -> str:
        """Format the peak, its owners and the FLOPs as text."""
        return report(self)

    def draw(self, path: str) -> None:
        """Plot the timeline to a PNG or the format of the path's suffix; needs matplotlib."""
        from deepspeed_alst.profiler.picture import draw

        draw({"": self.timeline}, path)

    # --- torch's side

    def _run(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run an operator and record its inputs, outputs and FLOPs."""
        scope, part = self._scopes.now()
        operator = str(getattr(func, "_overloadpacket", func))
        self._blocks.forget_sum()
        self._blocks.moment = Moment(self._phase, part, scope.module, operator)
        inputs = [self._see_input(func, x, scope.category) for x in tree_leaves((args, kwargs)) if _has_storage(x)]
        result = func(*args, **kwargs)
        category = scope.category or _inherited(inputs)
        outputs = [self._see(x, category) for x in tree_leaves(result) if _has_storage(x)]
        self._claim_by_use(func, inputs, outputs)
        if adds_for_autograd(func, args, kwargs) and len(inputs) == 2 and outputs[0] not in inputs:
            self._blocks.expect_sum_in_place(*inputs)
        self._count(func, args, kwargs, result, category)
        return result

    def _see(self, tensor: torch.Tensor, category: Category, *, initial: bool = False) -> Block:
        if tensor.device.type == "cpu" and self._device_type != "cpu":
            category = "host"
        return self._blocks.see(tensor.untyped_storage(), category, initial=initial)

    def _see_input(self, func: Any, tensor: torch.Tensor, category: Category | None) -> Block:
        """Record an input as older than the ledger, unless it is the data of a new ``torch.tensor``."""
        is_new = func is torch.ops.aten.lift_fresh.default
        return self._see(tensor, (is_new and category) or "other", initial=not is_new)

    def _claim_by_use(self, func: Any, inputs: list[Block], outputs: list[Block]) -> None:
        if getattr(func, "namespace", "") in _COLLECTIVES:
            for block in inputs + outputs:
                self._blocks.claim(block, "communication")
        elif self._scopes.accumulates():
            for block in outputs:
                self._blocks.claim(block, "gradients")

    def _claim_model(self) -> None:
        self.claim(self._model.buffers(), "weights")
        for name, param in self._model.named_parameters():
            self.claim([param], "weights")
            block = self._blocks.find(param.untyped_storage()) if _has_storage(param) else None
            if block is not None and param.dim() == 2:
                block.parameters[int(param.storage_offset())] = name
                self._shapes[name] = (param.shape, param.stride())
        self._claim_gradients()

    def _claim_gradients(self) -> None:
        self.claim([param.grad for param in self._model.parameters() if param.grad is not None], "gradients")

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any, category: str) -> None:
        flops_of = formula(func)
        if flops_of is None:
            return
        moment = self._blocks.moment
        flops = flops_of(*args, **kwargs, out_val=result)
        self.spent[Spent(moment.phase, moment.part, category, moment.operator)] += flops
        if getattr(func, "_overloadpacket", None) in _WITH_WEIGHT:
            self._count_rows(*args[-2:])

    def _count_rows(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Count rows of a forward matmul: it uses the transposed weight, the input gradient the weight itself."""
        block = self._blocks.find(weight.untyped_storage())
        name = block.parameters.get(int(weight.storage_offset())) if block is not None else None
        if name is None:
            return
        shape, stride = self._shapes[name]
        if weight.shape[-2:] == shape[::-1] and weight.stride()[-2:] == stride[::-1]:
            self.rows[name] += x.shape[:-1].numel()

    def _seen(self, storage: torch.UntypedStorage) -> None:
        """Record the new size of a tracked storage."""
        block = self._blocks.find(storage)
        if block is not None:
            self._blocks.see(storage, block.category)

    def _before_module(self, module: torch.nn.Module, args: Any) -> None:
        self._scopes.enter_module(module)

    def _after_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        # ZeRO-3 gives a parameter its memory only while its module runs.
        self.claim(module.parameters(recurse=False), "weights")
        self._scopes.leave_module(module)


def _has_storage(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not is_traceable_wrapper_subclass(x) and x.layout is torch.strided


def _inherited(inputs: list[Block]) -> Category:
    """Return the largest input's owner, for operators outside modules: a loss inherits from its logits."""
    heirs = [block for block in inputs if block.category not in _NOT_INHERITED]
    return max(heirs, key=lambda block: block.num_bytes).category if heirs else "other"

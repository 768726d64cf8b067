"""Attention cache of a checkpointed layer: the recomputation reuses the output that the forward saved.

A dispatch mode records the results of attention's forward operators in a layer's forward; in the recomputation another
returns them without running the operators. It is below autograd, which builds the same backward node over the same
numbers both times: gradients are bitwise equal, under any masks, windows and documents.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Put = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Offloads a tensor and returns a function to restore it on the tensor's own device."""

# Names without namespace, as each build of a hub kernel has its own. All return the output, the log-sum-exp, then small
# values (seeds) or values that no backward reads (sums of split kernels).
_OPERATORS = frozenset(
    {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attn_forward",  # flash-attn 2 and 3, and the hub's builds of them
        "_flash_attn_varlen_forward",
        "fwd",  # their compiled extensions, called directly
        "varlen_fwd",
    }
)
_LOG_SUM_EXP = "compute_log_sumexp"
# Maximum elements of a result that is saved as it is: a seed, an offset.
_SMALL = 16

_NO_OPERATOR = "no known attention operator (as in sdpa's math backend, eager attention or an unregistered kernel)"

_thread_state = threading.local()


def on_device(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Keep a tensor on its device; a ``Put``."""
    return lambda: tensor


class _Saved(list[tuple[Any, list[Callable[[], torch.Tensor]]]]):
    """A list that supports weak references."""


class CheckpointFrame:
    """One call of a checkpointed layer: the tensors that its forward saves, by ``put``, for its recomputation.

    The layer runs twice in it, and code inside looks up the frame of its thread, which in a backward is autograd's.
    With ``saves_attention`` attention's output is saved instead of recomputed.
    """

    def __init__(self, put: Put = on_device, saves_attention: bool = False) -> None:
        self.saves_attention = saves_attention
        self.recomputing = False
        # Attention implementation of each forward call whose output was saved, and of each that is recomputed.
        self.saved_attention: list[str] = []
        self.recomputed_attention: list[str] = []
        self._put = put
        self._saved: _Saved | None = _Saved()
        self._saved_ref = weakref.ref(self._saved)
        self._num_loaded = 0

    def save(self, *tensors: torch.Tensor, note: Any) -> None:
        """Save tensors in the forward, and any other data as ``note``."""
        self.saved.append((note, [self._put(tensor.detach()) for tensor in tensors]))

    def load(self) -> tuple[Any, list[torch.Tensor]]:
        """Return the next note and tensors that the forward saved, in the recomputation."""
        note, gets = self.saved[self._num_loaded]
        self._num_loaded += 1
        return note, [get() for get in gets]

    @property
    def saved(self) -> _Saved:
        """All saved tensors, as long as an owner holds them."""
        saved = self._saved_ref()
        assert saved is not None, "a recomputation after its checkpoint has released its saved tensors"
        return saved

    def release(self) -> None:
        """Release the saved tensors after the forward; the caller that read ``saved`` then owns them.

        The node of a reentrant checkpoint, and its frame, live as long as the loss; the saved tensors must not.
        """
        self._saved = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Make this the thread's frame inside the context; each run after the first is a recomputation."""
        before, _thread_state.frame = getattr(_thread_state, "frame", None), self
        self._num_loaded = 0
        try:
            yield
        finally:
            # A non-reentrant checkpoint stops its recomputation early by an exception.
            _thread_state.frame = before
            self.recomputing = True


@dataclass
class AttentionOp:
    """One run of an attention operator in a forward."""

    name: str
    outputs: list[torch.Tensor]  # output and log-sum-exp; empty once they are saved
    layouts: list[tuple[torch.Size, tuple[int, ...]]]  # size and stride of each
    others: Any  # other results, large ones emptied, in the operator's type of sequence

    def pop_outputs(self) -> list[torch.Tensor]:
        """Return both outputs as ``[numel]``, for any strides, and drop the references to them."""
        outputs, self.outputs = self.outputs, []
        return [flat_view(x) for x in outputs]


def saving_frame(attention: str, has_operators: bool = True) -> CheckpointFrame | None:
    """Return the frame that is to save the output of the next call of the named attention, or None.

    A compiled graph, which has no operators that a mode can see, must not run under a mode.
    """
    frame = getattr(_thread_state, "frame", None)
    if frame is None or not frame.saves_attention:
        return None
    if has_operators:
        return frame
    if not frame.recomputing:
        frame.recomputed_attention.append(attention)
    return None


def attend_cached(frame: CheckpointFrame, run: Callable[[], Any]) -> Any:
    """Run one attention call: save its output in a layer's forward, reuse it in the recomputation."""
    if frame.recomputing:
        ops, flat = frame.load()
        with ReplayMode(ops, flat):
            return run()
    result, ops = record_attention(frame, run)
    frame.save(*(x for op in ops for x in op.pop_outputs()), note=ops)
    return result


def record_attention(frame: CheckpointFrame, run: Callable[[], Any]) -> tuple[Any, list[AttentionOp]]:
    """Run an attention call; return its result and its operators, or none if one of them cannot be saved.

    The operators' names, or the reason, are added to the frame.
    """
    with _RecordMode() as mode:
        result = run()
    if mode.ops and not mode.problems:
        frame.saved_attention.append(", ".join(op.name for op in mode.ops))
        return result, mode.ops
    frame.recomputed_attention.append(", ".join(mode.problems) or _NO_OPERATOR)
    return result, []


class _RecordMode(TorchDispatchMode):
    """Dispatch mode that runs everything and records attention operators."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[AttentionOp] = []
        self.problems: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_attention(func):
            return func(*args, **kwargs)
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if not named.get(_LOG_SUM_EXP, True):
            # A reentrant checkpoint runs its forward without gradients, where the kernel would omit it.
            args, kwargs = (), named | {_LOG_SUM_EXP: True}
        result = func(*args, **kwargs)
        if problem := _problem(named, result):
            self.problems.append(f"{func.name()} {problem}")
        else:
            layouts = [(x.shape, x.stride()) for x in result[:2]]
            others = (x.new_empty(0) if isinstance(x, torch.Tensor) and x.numel() > _SMALL else x for x in result[2:])
            self.ops.append(AttentionOp(func.name(), list(result[:2]), layouts, type(result)(others)))
        return result


class ReplayMode(TorchDispatchMode):
    """Dispatch mode that returns each operator's recorded results, in order, instead of running it."""

    def __init__(self, ops: list[AttentionOp], flat: list[torch.Tensor]) -> None:
        super().__init__()
        # New views, since autograd takes ownership of them.
        layouts = [layout for op in ops for layout in op.layouts]
        outputs = [x.as_strided(*layout, x.storage_offset()) for x, layout in zip(flat, layouts, strict=True)]
        self._left = list(zip(ops, outputs[::2], outputs[1::2], strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if _is_attention(func) and self._left:
            op, *outputs = self._left.pop(0)
            if op.name == func.name():
                return type(op.others)([*outputs, *op.others])
            # With gradients, sdpa may choose another backend than in a reentrant checkpoint's forward.
            self._left.clear()
        return func(*args, **(kwargs or {}))


def is_dense(x: torch.Tensor) -> bool:
    """Return True if a tensor fills its memory range without gaps, in any order of dims."""
    inner_last = sorted(range(x.dim()), key=lambda dim: x.stride(dim), reverse=True)
    return x.permute(inner_last).is_contiguous()


def flat_view(x: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor's elements in memory order, ``[numel]``; a view."""
    return x.as_strided((x.numel(),), (1,), x.storage_offset())


def _is_attention(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and func._schema.name.split("::")[-1] in _OPERATORS


def _problem(named: dict[str, Any], result: Any) -> str:
    """Return the reason why an operator's results cannot be saved; empty if they can."""
    if any(named.get(name) for name in ("dropout_p", "p_dropout")):
        # A replay does not advance the generator, so that later dropout would draw other numbers.
        return "with dropout"
    if any(named.get(name) is not None for name in ("out", "out_")):
        return "into an output that it was given"
    known = len(result) >= 2 and all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in result[:2])
    if not known or not all(is_dense(x) for x in result[:2]):
        return "with results of an unknown form"
    return ""

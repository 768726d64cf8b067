"""Attention that runs forward once a step, in a layer that runs twice: its output is kept, the recomputation takes it.

A dispatch mode knows attention's forward operators. In a layer's forward it notes what they return; in the
recomputation it returns that again, and runs nothing. It stands below autograd, which builds the same backward node
over the same numbers both times: gradients are the same bit by bit, whatever masks, windows and documents there were.

The mode is there within the attention call only. What ran without a known operator is not kept, and runs again.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_alst.offload.frames import Frame, current_frame
from deepspeed_alst.offload.layout import is_dense, laid_flat

# By the last part of their names: kernels of the hub have a namespace for each build. All of them return the output
# first, the log-sum-exp second, and then what is small (seeds) or what no backward reads (sums of split kernels).
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
_DROPOUT = ("dropout_p", "p_dropout")
_GIVEN_OUTPUT = ("out", "out_")
_LOG_SUM_EXP = "compute_log_sumexp"
# Elements of a result that is held as it is: a seed, an offset.
_FEW = 16


@dataclass
class Ran:
    """An attention operator that ran in a forward."""

    name: str
    outputs: list[torch.Tensor]
    """Output and log-sum-exp; empty once they are kept."""
    layouts: list[tuple[torch.Size, tuple[int, ...]]]
    """Sizes and strides of both."""
    others: list[Any]
    """What else it returned, without what is large."""
    container: Callable[[list[Any]], Any]
    """Makes of a list what the operator returns: a tuple or a list."""

    def lay_flat(self) -> list[torch.Tensor]:
        """Both as ``[numel]``, contiguous, whatever their strides are; they are let go of here."""
        outputs, self.outputs = self.outputs, []
        return [laid_flat(x) for x in outputs]

    def raise_up(self, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The reverse: both in the layouts that the operator gave them, as new views."""
        return [x.as_strided(*layout, x.storage_offset()) for x, layout in zip(flat, self.layouts, strict=True)]

    def empty_output(self, like: torch.Tensor) -> torch.Tensor:
        """An output of this layout without values, where ``like`` is and of its dtype."""
        return torch.empty_strided(*self.layouts[0], dtype=like.dtype, device=like.device)

    def results(self, outputs: Sequence[torch.Tensor]) -> Any:
        """What the operator returns. Outputs are to be new objects, as autograd makes what it is given its own."""
        return self.container([*outputs, *self.others])


@dataclass
class Seen:
    """What an attention call did."""

    ran: list[Ran] = field(default_factory=list)
    """Its attention operators, if all of them can be kept."""
    words: str = ""
    """What it ran as."""


def keeping_frame(attention: str, has_operators: bool = True) -> Frame | None:
    """The frame that is to keep the output of the attention that is about to run, if there is one.

    Args:
        attention: its name.
        has_operators: whether it runs as operators that a mode can see; a compiled graph is not to meet a mode.
    """
    frame = current_frame()
    if frame is None or not frame.keeps_attention:
        return None
    if has_operators:
        return frame
    if not frame.recomputing:
        frame.unkept_attention.append(attention)
    return None


def attend_once(frame: Frame, run: Callable[[], Any]) -> Any:
    """``run()``, one attention call: in a layer's forward its output is kept, in the recomputation it is taken."""
    if frame.recomputing:
        ran: list[Ran] = frame.note()
        flat = frame.take()
        outputs = [each.raise_up(flat[2 * i : 2 * i + 2]) for i, each in enumerate(ran)]
        with replayed(ran, outputs):
            return run()
    result, seen = record(frame, run)
    frame.keep(*(x for each in seen.ran for x in each.lay_flat()), note=seen.ran)
    return result


def record(frame: Frame, run: Callable[[], Any]) -> tuple[Any, Seen]:
    """``run()`` and what it did, which the frame is told as well."""
    recording = _Recording()
    with recording:
        result = run()
    seen = recording.seen()
    (frame.kept_attention if seen.ran else frame.unkept_attention).append(seen.words)
    return result, seen


@contextlib.contextmanager
def replayed(ran: list[Ran], outputs: list[list[torch.Tensor]]) -> Iterator[None]:
    """Inside, operators that ran once return these outputs and log-sum-exps, one pair each, and do not run."""
    if not ran:
        yield
        return
    with _Replaying(ran, outputs):
        yield


class _Recording(TorchDispatchMode):
    """Lets everything run."""

    def __init__(self) -> None:
        super().__init__()
        self._ran: list[Ran] = []
        self._others: dict[str, None] = {}  # a set in order
        self._refusals: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_attention(func):
            if not getattr(func, "is_view", False):
                self._others[str(getattr(func, "_overloadpacket", func))] = None
            return func(*args, **kwargs)
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if not named.get(_LOG_SUM_EXP, True):
            # A reentrant checkpoint runs its forward without gradients, for which the kernel would leave it out.
            args, kwargs = (), named | {_LOG_SUM_EXP: True}
        result = func(*args, **kwargs)
        refusal = _refusal(named, result)
        if refusal:
            self._refusals.append(f"{func.name()} {refusal}")
        else:
            self._ran.append(_ran(func, result))
        return result

    def seen(self) -> Seen:
        if self._refusals:
            return Seen(words=", ".join(self._refusals))
        if self._ran:
            return Seen(self._ran, ", ".join(each.name for each in self._ran))
        return Seen(words=_what_ran(list(self._others)))


class _Replaying(TorchDispatchMode):
    """Gives each operator its results of the first time, in order."""

    def __init__(self, ran: list[Ran], outputs: list[list[torch.Tensor]]) -> None:
        super().__init__()
        self._left = list(zip(ran, outputs, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if _is_attention(func) and self._left:
            ran, outputs = self._left.pop(0)
            if ran.name == func.name():
                return ran.results(outputs)
            # With gradients sdpa may choose another backend than a reentrant checkpoint's forward had without them.
            self._left.clear()
        return func(*args, **(kwargs or {}))


def _is_attention(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and func._schema.name.split("::")[-1] in _OPERATORS


def _refusal(named: dict[str, Any], result: Any) -> str:
    """Why the results of an operator cannot be kept; empty if they can."""
    if any(named.get(name) for name in _DROPOUT):
        # What it drew would be kept, but not that it drew: dropout behind it would find the generator elsewhere.
        return "with dropout"
    if any(named.get(name) is not None for name in _GIVEN_OUTPUT):
        return "into an output that it was given"
    known = len(result) >= 2 and all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in result[:2])
    if not known or not all(is_dense(x) for x in result[:2]):
        return "with results of an unknown form"
    return ""


def _ran(func: Any, result: Any) -> Ran:
    return Ran(
        name=func.name(),
        outputs=list(result[:2]),
        layouts=[(x.shape, x.stride()) for x in result[:2]],
        others=[_small(x) for x in result[2:]],
        container=type(result),
    )


def _small(x: Any) -> Any:
    return x.new_empty(0) if isinstance(x, torch.Tensor) and x.numel() > _FEW else x


def _what_ran(operators: list[str]) -> str:
    if any(name.endswith(("softmax", "_safe_softmax")) for name in operators):
        return "matrix products and a softmax (sdpa's math backend, or eager)"
    return "a kernel that is no known operator" + (f" ({', '.join(operators)})" if operators else "")

"""Attention that runs forward once per step in a checkpointed layer: recomputation reuses its saved output.

A dispatch mode records the results of attention's forward operators in a layer's forward; in the recomputation it
returns them without running the operators. It is below autograd, which builds the same backward node over the same
numbers both times: gradients are bitwise equal, under any masks, windows and documents.

The mode is active within the attention call only. Calls without a known operator are not saved, and run again.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_alst.offload.checkpoint_frame import CheckpointFrame, current_frame
from deepspeed_alst.offload.layout import is_dense, laid_flat

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
_DROPOUT = ("dropout_p", "p_dropout")
_GIVEN_OUTPUT = ("out", "out_")
_LOG_SUM_EXP = "compute_log_sumexp"
# Maximum elements of a result that is saved as it is: a seed, an offset.
_FEW = 16


@dataclass
class Ran:
    """Attention operator that ran in a forward."""

    name: str
    outputs: list[torch.Tensor]
    """Output and log-sum-exp; empty once they are saved."""
    layouts: list[tuple[torch.Size, tuple[int, ...]]]
    """Sizes and strides of both."""
    others: list[Any]
    """Other results, the large ones emptied."""
    container: Callable[[list[Any]], Any]
    """Builds the operator's return value, a tuple or a list, from a list."""

    def lay_flat(self) -> list[torch.Tensor]:
        """Return both as ``[numel]``, contiguous for any strides, and drop the references to them."""
        outputs, self.outputs = self.outputs, []
        return [laid_flat(x) for x in outputs]

    def raise_up(self, flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return flat tensors in the layouts of the operator's results, as new views."""
        return [x.as_strided(*layout, x.storage_offset()) for x, layout in zip(flat, self.layouts, strict=True)]

    def empty_output(self, like: torch.Tensor) -> torch.Tensor:
        """Return an output of this layout without values, with the device and dtype of ``like``."""
        return torch.empty_strided(*self.layouts[0], dtype=like.dtype, device=like.device)

    def results(self, outputs: Sequence[torch.Tensor]) -> Any:
        """Return the operator's results. Outputs must be new objects, since autograd takes ownership of them."""
        return self.container([*outputs, *self.others])


@dataclass
class Seen:
    """Operators of an attention call."""

    ran: list[Ran] = field(default_factory=list)
    """Its attention operators, if all of them can be saved."""
    words: str = ""
    """Names of the operators it ran as."""


def keeping_frame(attention: str, has_operators: bool = True) -> CheckpointFrame | None:
    """Return the frame that is to save the output of the next attention call, or None.

    Args:
        attention: name of the attention.
        has_operators: True if it runs as operators that a mode can see; a compiled graph must not run under a mode.
    """
    frame = current_frame()
    if frame is None or not frame.keeps_attention:
        return None
    if has_operators:
        return frame
    if not frame.recomputing:
        frame.unkept_attention.append(attention)
    return None


def attend_once(frame: CheckpointFrame, run: Callable[[], Any]) -> Any:
    """Run one attention call: save its output in a layer's forward, reuse it in the recomputation."""
    if frame.recomputing:
        ran: list[Ran] = frame.note()
        flat = frame.take()
        outputs = [each.raise_up(flat[2 * i : 2 * i + 2]) for i, each in enumerate(ran)]
        with replayed(ran, outputs):
            return run()
    result, seen = record(frame, run)
    frame.keep(*(x for each in seen.ran for x in each.lay_flat()), note=seen.ran)
    return result


def record(frame: CheckpointFrame, run: Callable[[], Any]) -> tuple[Any, Seen]:
    """Run an attention call; return its result and its operators, which are also noted in the frame."""
    recording = _Recording()
    with recording:
        result = run()
    seen = recording.seen()
    (frame.kept_attention if seen.ran else frame.unkept_attention).append(seen.words)
    return result, seen


@contextlib.contextmanager
def replayed(ran: list[Ran], outputs: list[list[torch.Tensor]]) -> Iterator[None]:
    """Replay these outputs and log-sum-exps, one pair per recorded operator, instead of running the operators."""
    if not ran:
        yield
        return
    with _Replaying(ran, outputs):
        yield


class _Recording(TorchDispatchMode):
    """Dispatch mode that runs everything and records attention operators."""

    def __init__(self) -> None:
        super().__init__()
        self._ran: list[Ran] = []
        self._others: dict[str, None] = {}  # an ordered set
        self._refusals: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_attention(func):
            if not getattr(func, "is_view", False):
                self._others[str(getattr(func, "_overloadpacket", func))] = None
            return func(*args, **kwargs)
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if not named.get(_LOG_SUM_EXP, True):
            # A reentrant checkpoint runs its forward without gradients, where the kernel would omit it.
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
    """Dispatch mode that returns each operator's recorded results, in order."""

    def __init__(self, ran: list[Ran], outputs: list[list[torch.Tensor]]) -> None:
        super().__init__()
        self._left = list(zip(ran, outputs, strict=True))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if _is_attention(func) and self._left:
            ran, outputs = self._left.pop(0)
            if ran.name == func.name():
                return ran.results(outputs)
            # With gradients, sdpa may choose another backend than in a reentrant checkpoint's forward.
            self._left.clear()
        return func(*args, **(kwargs or {}))


def _is_attention(func: Any) -> bool:
    return isinstance(func, torch._ops.OpOverload) and func._schema.name.split("::")[-1] in _OPERATORS


def _refusal(named: dict[str, Any], result: Any) -> str:
    """Return the reason why an operator's results cannot be saved; empty if they can."""
    if any(named.get(name) for name in _DROPOUT):
        # A replay does not advance the generator, so that later dropout would draw other numbers.
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

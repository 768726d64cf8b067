"""Counter-based random numbers for a model's forward, independent of ranks, tiles and recomputation.

Within ``CountedDraws`` torch's random functions use random_draws/counter_based.py; no function is replaced. Code that
may run again is a branch (a checkpointed layer, a tiled module): it counts its calls from 0 on each run.
"""

import contextlib
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.counter_based import COUNTED, attention_keeps, key_of

_ROW_STRIDE = 2**40  # offset between batch rows: longer than any sequence
# Files of functions that recompute another function in the backward.
_CHECKPOINTS = (torch.utils.checkpoint.__file__, "deepspeed/runtime/activation_checkpointing/checkpointing.py")


@dataclass(frozen=True)
class Forward:
    """One forward of a model."""

    key: tuple[int, ...]
    """Unique key among all forwards of the training, on all replicas."""
    replica: int
    rank: int
    """This process's rank in its sequence-parallel group."""
    rows: int
    """B, the batch size."""
    tokens: int
    """s, the tokens per shard."""


@dataclass
class _Place:
    """Position of the next draw in a forward."""

    forward: Forward
    path: tuple[int, ...] = ()
    """Numbers of the enclosing branches, outermost first."""
    tile: slice | torch.Tensor | None = None
    """Token indices of a tile in the flattened shard; None outside of tiles."""
    calls: Counter[str] = field(default_factory=Counter)

    def next_key(self, kind: str, *parts: Any) -> int:
        """Return the key of the next draw of a kind; kinds have separate counters, as their counts differ by rank."""
        _refuse_checkpoints()
        self.calls[kind] += 1
        return key_of(self.forward.key, self.path, kind, self.calls[kind], *parts)

    def at(self, shape: torch.Size, of_tensor: bool, device: torch.device) -> tuple[int, torch.Tensor]:
        """Return key and rows for a draw of this shape, for an existing tensor or a new one.

        The rows of a tensor with one per token of the shard are the tokens' indices in the whole sequence, on any rank.
        One without tokens (of a weight, a batch row, a layer to skip) is the same on all ranks of a sequence, any other
        (the tokens routed to an expert) private to the rank.
        """
        forward, s, flat = self.forward, self.forward.tokens, self.tile
        if not isinstance(flat, torch.Tensor):
            tile = self.tile or slice(0, forward.rows * s)
            flat = torch.arange(tile.start, tile.stop, device=device)
        has_tokens = any(shape[:dims].numel() == len(flat) for dims in range(1, len(shape) + 1))
        if has_tokens and (len(shape) > 1 or of_tensor):
            return self.next_key("tokens", forward.replica), flat // s * _ROW_STRIDE + flat % s + forward.rank * s
        rows = torch.arange(shape[0] if shape else 1, device=device)
        if len(shape) < 2:  # a decision of all replicas (a layer to skip) is one number
            return self.next_key("shared", forward.replica if shape.numel() > 1 else None), rows
        if shape[0] not in (1, forward.rows) or (of_tensor and len(shape) == 2 and shape[1] > 1):
            tile = self.tile
            start = None if tile is None else tile.start if isinstance(tile, slice) else int(tile[0])
            return self.next_key("rank", forward.replica, forward.rank, start), rows
        if s in shape[1:]:
            raise UnsupportedModelError(
                f"random numbers of shape {list(shape)} for {forward.rows} x {s} tokens: sequence parallelism needs to "
                "know their token dimension. Draw them as [batch, tokens, ...]"
            )
        return self.next_key("shared", forward.replica), rows


class CountedDraws(TorchFunctionMode):
    """Draw random numbers by counters, in one thread and one forward."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.place = _Place(forward)
        self.first_head: int | None = None
        """First of this rank's heads in attention; None where all ranks have equal numbers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COUNTED and kwargs.get("generator") is None:  # a generator of the program's own is kept
            return COUNTED[func](self, func, *args, **kwargs)
        return func(*args, **kwargs)

    def attention_key(self) -> int:
        """Return the key of the next dropout of attention."""
        return self.place.next_key("attention", self.place.forward.replica)

    @contextlib.contextmanager
    def attention(self, device: torch.device) -> Iterator[None]:
        """Draw the dropout of attention by counters inside: on CPU of a mask, on a GPU by the kernel, from a seed."""
        key, rank = self.attention_key(), self.place.forward.rank
        if device.type == "cpu":
            with _CountedMasks(key, rank, self.first_head):
                yield
            return
        with torch.random.fork_rng([device], device_type=device.type):
            torch.get_device_module(device).manual_seed(key_of(key, rank))
            yield


def _refuse_checkpoints() -> None:
    """Raise if a draw is in a checkpoint outside transformers' layers, whose recomputation would differ."""
    in_backward = torch._C._current_graph_task_id() != -1  # its forward passed this check
    frame = None if in_backward else inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == __file__ and code.co_name == _run_again.__name__:
            return
        if code.co_filename.endswith(_CHECKPOINTS):
            raise UnsupportedModelError(
                "the model draws random numbers in its own torch.utils.checkpoint, whose recomputation would draw "
                "others. Use model.activation_checkpointing_enable(), or set dropout to 0"
            )
        frame = frame.f_back


Branch = Callable[..., contextlib.AbstractContextManager[None]]
"""``again(tile=None)``: context that draws from the branch's start, for a tile's tokens or all tokens."""


def branch() -> Branch:
    """Start a branch: a part of the forward that may run again, whole or for a tile of the shard's tokens."""
    mode = current_draws()
    if mode is None:
        return lambda tile=None: contextlib.nullcontext()
    forward, calls = mode.place.forward, mode.place.calls
    path = (*mode.place.path, calls["branch"])
    calls["branch"] += 1

    @contextlib.contextmanager
    def again(tile: slice | torch.Tensor | None = None) -> Iterator[None]:
        with contextlib.ExitStack() as entered:
            inside = current_draws() or entered.enter_context(CountedDraws(forward))  # a backward has none
            before, inside.place = inside.place, _Place(forward, path, tile)
            try:
                yield
            finally:
                inside.place = before

    return again


@contextlib.contextmanager
def not_counted() -> Iterator[None]:
    """Restore this thread's counters on exit: a trial inside leaves the numbers of later draws as they are."""
    mode = current_draws()
    before = Counter(mode.place.calls) if mode is not None else Counter()
    try:
        yield
    finally:
        if mode is not None:
            mode.place.calls = before


def run_checkpoint(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``checkpoint(function, ...)``, whose recomputation draws the numbers of its forward."""
    return checkpoint(functools.partial(_run_again, branch(), function), *args, **kwargs)


def _run_again(again: Branch, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with again():
        return function(*args, **kwargs)


def current_draws() -> CountedDraws | None:
    """Return the mode of this thread."""
    modes = _get_current_function_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, CountedDraws)), None)


def counted_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return ``CountedDraws.attention`` of this thread's mode, if it has one."""
    mode = current_draws()
    return contextlib.nullcontext() if mode is None else mode.attention(device)


@contextlib.contextmanager
def heads_from(first: int) -> Iterator[None]:
    """Draw the dropout of attention inside for a rank's heads from this one on."""
    mode = current_draws()
    if mode is None:
        yield
        return
    mode.first_head = first
    try:
        yield
    finally:
        mode.first_head = None


class _CountedMasks(TorchDispatchMode):
    """Draw the dropout masks of torch's CPU attention, ``[B, h, S, S]``, by this rank's heads and the queries."""

    def __init__(self, key: int, rank: int, first_head: int | None) -> None:
        super().__init__()
        self._key, self._rank, self._first_head = key, rank, first_head

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.bernoulli_.float:
            return func(*args, **kwargs)
        mask_BhSS, p = args[0], kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        B, h, S, _ = mask_BhSS.shape
        first = self._rank * h if self._first_head is None else self._first_head
        places = range(B), range(first, first + h), range(S), range(mask_BhSS.shape[3])
        return mask_BhSS.copy_(attention_keeps(self._key, *places, p, mask_BhSS.device))

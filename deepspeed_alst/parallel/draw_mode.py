"""The random numbers that a model's forward draws, by whatever function of torch, drawn by counters instead.

Within ``CountedDraws`` torch's functions of chance are others (parallel/draws.py): dropout, noise, samples. The mode is
of its thread and of one forward; no function is replaced. A number's key says in which forward of which step it is
drawn, and at which call; its row says of which token, or which rank of a sequence drew it:

- a tensor with a row for each token of the shard: the tokens of the whole sequence, on whichever rank they are;
- one without tokens (of a weight, a batch row, a layer to skip): the same on all ranks of a sequence;
- any other (the tokens that an expert gets): the rank's own.

What may run again is a branch: a checkpointed layer, a module in tiles. It counts its calls from 0 each time.

Legend: B batch, s tokens of this rank's shard, N rows, C columns.
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
from deepspeed_alst.parallel import draws
from deepspeed_alst.parallel.draw_functions import COUNTED

_ROW_STRIDE = 2**40  # between the tokens of two rows of a batch: no sequence is as long
# Files of functions that run another again in the backward.
_CHECKPOINTS = (torch.utils.checkpoint.__file__, "deepspeed/runtime/activation_checkpointing/checkpointing.py")


@dataclass(frozen=True)
class Forward:
    """One forward of a model."""

    key: tuple[int, ...]
    """What tells it from every other of the training, on this replica or another."""
    replica: int
    rank: int
    """Of this process among those of its sequence."""
    rows: int
    """B."""
    tokens: int
    """s."""


@dataclass
class _Place:
    """Where in a forward the next number is drawn."""

    forward: Forward
    path: tuple[int, ...] = ()
    """The branches that lead there, each by its number in the one before."""
    tile: slice | torch.Tensor | None = None
    """The tokens of a tile, as places in the shard laid flat; None outside of tiles."""
    calls: Counter[str] = field(default_factory=Counter)

    def next_key(self, kind: str, *parts: Any) -> int:
        """The key of the next draw of a kind; kinds are counted apart, as ranks may draw some more often."""
        self.calls[kind] += 1
        return draws.key_of(self.forward.key, self.path, kind, self.calls[kind], *parts)

    def place(self, shape: torch.Size, of_tensor: bool, device: torch.device) -> tuple[int, torch.Tensor]:
        """The key and the rows of a draw of this shape, for a tensor that the model has or for a new one."""
        forward = self.forward
        flat = self._flat(device)
        count = len(flat)
        lead = next((dims for dims in range(1, len(shape) + 1) if shape[:dims].numel() == count), 0)
        if lead and (len(shape) > 1 or of_tensor):
            return self.next_key("tokens", forward.replica), self._tokens(flat)
        rows = torch.arange(shape[0] if shape else 1, device=device)
        if len(shape) < 2:  # what decides for all replicas (a layer to skip) is one number
            return self.next_key("shared", forward.replica if shape.numel() > 1 else None), rows
        if shape[0] not in (1, forward.rows) or (of_tensor and len(shape) == 2 and shape[1] > 1):
            tile = self.tile
            start = None if tile is None else tile.start if isinstance(tile, slice) else int(tile[0])
            return self.next_key("rank", forward.replica, forward.rank, start), rows
        if forward.tokens in shape[1:]:
            raise UnsupportedModelError(
                f"random numbers of shape {list(shape)} for {forward.rows} x {forward.tokens} tokens: which of them "
                "belong to which token is not known under sequence parallelism. Draw them as [batch, tokens, ...]"
            )
        return self.next_key("shared", forward.replica), rows

    def _flat(self, device: torch.device) -> torch.Tensor:
        """The tokens that the model works on just now, as places in the shard laid flat."""
        if isinstance(self.tile, torch.Tensor):
            return self.tile
        tile = self.tile or slice(0, self.forward.rows * self.forward.tokens)
        return torch.arange(tile.start, tile.stop, device=device)

    def _tokens(self, flat: torch.Tensor) -> torch.Tensor:
        """Their numbers in the whole batch."""
        s = self.forward.tokens
        return flat // s * _ROW_STRIDE + flat % s + self.forward.rank * s


class CountedDraws(TorchFunctionMode):
    """Inside, random numbers are drawn by counters."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.place = _Place(forward)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        draw = COUNTED.get(func)
        # A generator of the program's own is the program's.
        if draw is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        return draw(self, func, *args, **kwargs)

    def at(self, shape: torch.Size, of_tensor: bool, device: torch.device) -> tuple[int, torch.Tensor]:
        """The key and the rows of a draw."""
        _refuse_checkpoints()
        return self.place.place(shape, of_tensor, device)

    @contextlib.contextmanager
    def attention(self, device: torch.device) -> Iterator[None]:
        """Inside, an attention kernel draws its dropout by counters.

        A GPU's kernels draw from the device's generator, which starts from the key here and is put back; on CPU torch
        makes a mask of every pair of tokens, whose numbers go by head and query.
        """
        _refuse_checkpoints()
        key, rank = self.place.next_key("attention", self.place.forward.replica), self.place.forward.rank
        if device.type == "cpu":
            with _CountedMasks(key, rank):
                yield
            return
        with torch.random.fork_rng([device], device_type=device.type):
            torch.get_device_module(device).manual_seed(draws.key_of(key, rank))
            yield


def _refuse_checkpoints() -> None:
    """Refuse a draw in a checkpoint that is not transformers' of a layer, and would not draw it again."""
    in_backward = torch._C._current_graph_task_id() != -1  # a forward that drew the same was let through
    frame = None if in_backward else inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == __file__ and code.co_name == _run_again.__name__:
            return
        if code.co_filename.endswith(_CHECKPOINTS):
            raise UnsupportedModelError(
                "the model draws random numbers in a checkpoint of its own, whose recomputation would draw others. Use "
                "transformers', model.gradient_checkpointing_enable(), or set dropout to 0"
            )
        frame = frame.f_back


Branch = Callable[..., contextlib.AbstractContextManager[None]]
"""``again(tile=None)``: inside, numbers are drawn from the branch's beginning on, for a tile's tokens or for all."""


def branch() -> Branch:
    """Begin a part of the forward that may run again, as a whole or for a tile of the shard's tokens."""
    mode = current_draws()
    if mode is None:
        return lambda tile=None: contextlib.nullcontext()
    forward, calls = mode.place.forward, mode.place.calls
    path = (*mode.place.path, calls["branch"])
    calls["branch"] += 1

    @contextlib.contextmanager
    def again(tile: slice | torch.Tensor | None = None) -> Iterator[None]:
        with contextlib.ExitStack() as entered:
            inside = current_draws() or entered.enter_context(CountedDraws(forward))  # none in a backward
            before, inside.place = inside.place, _Place(forward, path, tile)
            try:
                yield
            finally:
                inside.place = before

    return again


def runs_again(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose every run draws the same: a branch that begins here."""
    return functools.partial(_run_again, branch(), function)


def _run_again(again: Branch, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with again():
        return function(*args, **kwargs)


def current_draws() -> CountedDraws | None:
    """The mode of this thread."""
    modes = _get_current_function_mode_stack()
    return next((mode for mode in reversed(modes) if isinstance(mode, CountedDraws)), None)


def counted_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """``CountedDraws.attention`` of this thread's mode."""
    mode = current_draws()
    return contextlib.nullcontext() if mode is None else mode.attention(device)


class _CountedMasks(TorchDispatchMode):
    """The masks that torch's own attention draws on CPU, ``[B, h, S, S]``, for this rank's heads of the whole."""

    def __init__(self, key: int, rank: int) -> None:
        super().__init__()
        self._key, self._rank = key, rank

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.bernoulli_.float:
            return func(*args, **kwargs)
        mask_BhSS, p = args[0], kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        B, h, S, _ = mask_BhSS.shape
        of = [torch.arange(size, device=mask_BhSS.device) for size in (B, h, S)]
        rows_BhS = (of[0][:, None, None] * 2**16 + of[1][:, None] + self._rank * h) * 2**32 + of[2]
        u_NS = draws.uniform(self._key, rows_BhS.flatten(), mask_BhSS.shape[3], torch.float32)
        return mask_BhSS.copy_((u_NS < p).view_as(mask_BhSS))

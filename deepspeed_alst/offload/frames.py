"""Calls of checkpointed layers: what a layer keeps in its forward for its recomputation in the backward.

A frame is made where a layer is checkpointed (models/checkpoints.py). The layer runs twice in it, and what runs inside
finds the frame of its thread: in a backward that is autograd's.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

Put = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Puts a tensor aside; what it returns gives it back, on the tensor's own device."""


def on_device(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A ``Put`` that leaves a tensor where it is."""
    return lambda: tensor


class Frame:
    """One call of a checkpointed layer.

    Args:
        put: where what is kept waits.
        keeps_attention: whether attention's output is to be kept, and not made again.
    """

    def __init__(self, put: Put = on_device, keeps_attention: bool = False) -> None:
        self.keeps_attention = keeps_attention
        self.recomputing = False
        self.kept_attention: list[str] = []
        """What attention ran as in the forward, a name for each call whose output was kept."""
        self.unkept_attention: list[str] = []
        """The same of calls whose output could not be kept, which the recomputation runs again."""
        self._put = put
        self._kept: _Kept | None = _Kept()
        self._owned = weakref.ref(self._kept)
        self._taken = 0

    def keep(self, *tensors: torch.Tensor, note: Any = None) -> None:
        """In the forward: put tensors aside for the recomputation, which takes them in the same order.

        ``note`` is whatever else the recomputation has to know of them.
        """
        self.kept.append(([self._put(tensor.detach()) for tensor in tensors], note))

    def note(self) -> Any:
        """In the recomputation: the note of what is taken next."""
        return self.kept[self._taken][1]

    def take(self) -> list[torch.Tensor]:
        """In the recomputation: what the forward kept at this place."""
        found, _ = self.kept[self._taken]
        self._taken += 1
        return [get() for get in found]

    @property
    def kept(self) -> "_Kept":
        """All that was put aside, while anybody holds it."""
        kept = self._owned()
        assert kept is not None, "a recomputation after its checkpoint let go of what it had saved"
        return kept

    def let_go(self) -> None:
        """After the forward: whoever took ``kept`` holds it from now on.

        The node of a reentrant checkpoint, and the frame with it, lives as long as the loss; what it saved does not.
        """
        self._kept = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the frame is its thread's; the second time and each later one it recomputes."""
        before = current_frame()
        _of_thread.frame = self
        self._taken = 0
        try:
            yield
        finally:
            # A non-reentrant checkpoint leaves its recomputation by an exception, as early as it can.
            _of_thread.frame = before
            self.recomputing = True


class _Kept(list[tuple[list[Callable[[], torch.Tensor]], Any]]):
    """A list that one may hold weakly."""


class _OfThread(threading.local):
    frame: Frame | None = None


_of_thread = _OfThread()


def current_frame() -> Frame | None:
    """The frame of the checkpointed layer that this thread runs; None outside of them."""
    return _of_thread.frame

"""Calls of checkpointed layers: what a layer keeps in its forward for its recomputation in the backward.

A frame is made where a layer is checkpointed (models/checkpoints.py). The layer runs twice in it, and what runs inside
finds the frame of its thread: in a backward that is autograd's.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

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
        self._put = put
        self._kept: list[list[Callable[[], torch.Tensor]]] = []
        self._taken = 0

    def keep(self, *tensors: torch.Tensor) -> None:
        """In the forward: put tensors aside for the recomputation, which takes them in the same order."""
        self._kept.append([self._put(tensor.detach()) for tensor in tensors])

    def take(self) -> list[torch.Tensor]:
        """In the recomputation: what the forward kept at this place."""
        found = self._kept[self._taken]
        self._taken += 1
        return [get() for get in found]

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


class _OfThread(threading.local):
    frame: Frame | None = None


_of_thread = _OfThread()


def current_frame() -> Frame | None:
    """The frame of the checkpointed layer that this thread runs; None outside of them."""
    return _of_thread.frame

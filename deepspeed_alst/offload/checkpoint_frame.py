"""Frames of checkpointed layers: the tensors that a layer's forward saves for its recomputation.

A frame is created where a layer is checkpointed (offload/hf_checkpoint_hook.py). The layer runs twice in it, and code
inside looks up the frame of its thread, which in a backward is autograd's.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

Put = Callable[[torch.Tensor], Callable[[], torch.Tensor]]
"""Function that offloads a tensor and returns a function to restore it on the tensor's own device."""


def on_device(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Keep a tensor on its device; a ``Put``."""
    return lambda: tensor


class CheckpointFrame:
    """One call of a checkpointed layer.

    Args:
        put: offloads the tensors that are saved.
        keeps_attention: True to save attention's output instead of recomputing it.
    """

    def __init__(self, put: Put = on_device, keeps_attention: bool = False) -> None:
        self.keeps_attention = keeps_attention
        self.recomputing = False
        self.kept_attention: list[str] = []
        """Attention implementation of each forward call whose output was saved."""
        self.unkept_attention: list[str] = []
        """Attention implementation of each call whose output could not be saved and is recomputed."""
        self._put = put
        self._kept: _Kept | None = _Kept()
        self._owned = weakref.ref(self._kept)
        self._taken = 0

    def keep(self, *tensors: torch.Tensor, note: Any = None) -> None:
        """Save tensors in the forward, and any other data as ``note``; the recomputation takes them in order."""
        self.kept.append(([self._put(tensor.detach()) for tensor in tensors], note))

    def note(self) -> Any:
        """Return the note of the next saved tensors, in the recomputation."""
        return self.kept[self._taken][1]

    def take(self) -> list[torch.Tensor]:
        """Return the next tensors that the forward saved, in the recomputation."""
        found, _ = self.kept[self._taken]
        self._taken += 1
        return [get() for get in found]

    @property
    def kept(self) -> "_Kept":
        """All saved tensors, as long as an owner holds them."""
        kept = self._owned()
        assert kept is not None, "a recomputation after its checkpoint let go of what it had saved"
        return kept

    def release_kept(self) -> None:
        """Release the saved tensors after the forward; the caller that took ``kept`` then owns them.

        The node of a reentrant checkpoint, and its frame, live as long as the loss; the saved tensors must not.
        """
        self._kept = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Make this the thread's frame inside the context; each run after the first is a recomputation."""
        before = current_frame()
        _of_thread.frame = self
        self._taken = 0
        try:
            yield
        finally:
            # A non-reentrant checkpoint stops its recomputation early by an exception.
            _of_thread.frame = before
            self.recomputing = True


class _Kept(list[tuple[list[Callable[[], torch.Tensor]], Any]]):
    """A list that supports weak references."""


class _OfThread(threading.local):
    frame: CheckpointFrame | None = None


_of_thread = _OfThread()


def current_frame() -> CheckpointFrame | None:
    """Return the frame of the checkpointed layer that this thread runs; None outside of one."""
    return _of_thread.frame

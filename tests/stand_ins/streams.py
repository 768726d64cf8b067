"""Streams as CUDA has them, as lazy as it may be: what is put on a side stream is done when somebody waits for it.

The computation's own stream runs at once. So whoever forgets to wait, or overwrites what a copy still reads, gets wrong
values here every time and not once in a while. Tensors are on the CPU.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_one_at_a_time = threading.RLock()
_current: list["Stream"] = []


class Stream:
    """One queue."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.queue: list[Callable[[], object]] = []

    def record_event(self, event=None):
        """What is done when all that is in the queue now is."""
        return Event(self, len(self.queue), list(self.queue))

    def wait_event(self, event) -> None:
        """The computation goes on after it."""
        assert self is default, "a side stream that waits for another is not needed here"
        event.synchronize()

    def wait_stream(self, stream) -> None:
        """A side stream waits for the computation, which has done everything."""
        assert stream is default

    def synchronize(self) -> None:
        """Do all of it."""
        while self.queue:
            self.queue.pop(0)()


class Event:
    """A moment in a queue."""

    def __init__(self, stream: Stream, length: int, works: list[Callable[[], object]]) -> None:
        self._stream, self._works = stream, works

    def synchronize(self) -> None:
        """Do what was in the queue before."""
        with _one_at_a_time:
            for work in self._works:
                if work in self._stream.queue:
                    self._stream.queue.remove(work)
                    work()


default = Stream()


def current_stream() -> Stream:
    """The one that work is put on."""
    return _current[-1] if _current else default


class _Lazy(TorchDispatchMode):
    """Puts copies on a stream's queue."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.copy_.default, f"{func} on a side stream"
        current_stream().queue.append(lambda: func(*args, **(kwargs or {})))
        return args[0]


@contextlib.contextmanager
def stream(stream: Stream) -> Iterator[None]:
    """Work inside goes on this stream."""
    _current.append(stream)
    try:
        with _Lazy():
            yield
    finally:
        _current.pop()

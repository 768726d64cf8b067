"""Copies between device and host, overlapped with the computation where the device supports it.

A copy starts after all work queued so far and returns an event. The consumer waits for it on the device's stream, which
does not block this process.
"""

from typing import Any

import torch


class DirectCopies:
    """Synchronous copies, for the CPU as the device."""

    def out(self, device_n: torch.Tensor, host_n: torch.Tensor) -> Any:
        """Copy to the host tensor; return the event to wait for."""
        host_n.copy_(device_n)

    def back(self, host_n: torch.Tensor, device_n: torch.Tensor) -> Any:
        """Copy to the device tensor; return the event to wait for."""
        device_n.copy_(host_n)

    def wait_on_device(self, done: Any) -> None:
        """Make all work queued from now on wait for a copy."""

    def wait_on_host(self, done: Any) -> None:
        """Block until a copy is done."""


class StreamCopies(DirectCopies):
    """Copies on a dedicated stream of a device module, such as ``torch.cuda``.

    Memory that a copy reads belongs to the computation's stream. Before it is freed, the computation must wait for
    the copy, unless the copied values no longer matter.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self._stream = module.Stream(device=device)

    def out(self, device_n: torch.Tensor, host_n: torch.Tensor) -> Any:
        """Start a copy to the host; return the event to wait for."""
        return self._copy(device_n, host_n)

    def back(self, host_n: torch.Tensor, device_n: torch.Tensor) -> Any:
        """Start a copy to the device; return the event to wait for."""
        done = self._copy(host_n, device_n)
        # The tensor may be freed before any wait: the backward may end without asking for it.
        device_n.record_stream(self._stream)
        return done

    def wait_on_device(self, done: Any) -> None:
        """Make the computation's stream wait for a copy."""
        self._module.current_stream().wait_event(done)

    def wait_on_host(self, done: Any) -> None:
        """Block until a copy is done."""
        done.synchronize()

    def _copy(self, source_n: torch.Tensor, target_n: torch.Tensor) -> Any:
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target_n.copy_(source_n, non_blocking=True)
            return self._stream.record_event()


Copies = DirectCopies | StreamCopies


def copies_of(device: torch.device) -> Copies:
    """Return the copies for a device."""
    if device.type == "cpu":
        return DirectCopies()
    return StreamCopies(torch.get_device_module(device), device)

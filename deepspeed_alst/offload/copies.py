"""Copies between a device and the host, beside the computation where the device can do both at once.

A copy out reads a tensor that the computation made; a copy back writes one that the computation will read. Each says
when it is done, and the side that needs it waits: the device's queue, not this process.
"""

from typing import Any, Protocol

import torch


class Copies(Protocol):
    """Of one device."""

    def out(self, device_n: torch.Tensor, host_n: torch.Tensor) -> Any:
        """Start a copy to the host, after all that was computed so far; returns what to wait for."""

    def back(self, host_n: torch.Tensor, device_n: torch.Tensor) -> Any:
        """Start a copy to the device, after all that was computed so far; returns what to wait for."""

    def wait_on_device(self, done: Any) -> None:
        """What is computed from now on comes after a copy."""

    def wait_on_host(self, done: Any) -> None:
        """Return when a copy is done."""


class DirectCopies:
    """Copies that are done when they are asked for: the device is the CPU."""

    def out(self, device_n: torch.Tensor, host_n: torch.Tensor) -> None:
        """Copy."""
        host_n.copy_(device_n)

    def back(self, host_n: torch.Tensor, device_n: torch.Tensor) -> None:
        """Copy."""
        device_n.copy_(host_n)

    def wait_on_device(self, done: None) -> None:
        """It is done."""

    def wait_on_host(self, done: None) -> None:
        """It is done."""


class StreamCopies:
    """Copies on a stream of their own.

    Memory that a copy reads belongs to the stream of the computation, so whoever lets go of it must have had the
    computation wait for the copy first, or not care what was copied.

    Args:
        module: of the device's kind, such as ``torch.cuda``.
        device: which one.
    """

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module = module
        self._stream = module.Stream(device=device)

    def out(self, device_n: torch.Tensor, host_n: torch.Tensor) -> Any:
        """Start a copy to the host."""
        return self._copy(device_n, host_n)

    def back(self, host_n: torch.Tensor, device_n: torch.Tensor) -> Any:
        """Start a copy to the device."""
        done = self._copy(host_n, device_n)
        # It may be let go of before anybody has waited: the backward may end without asking for it.
        device_n.record_stream(self._stream)
        return done

    def _copy(self, source_n: torch.Tensor, target_n: torch.Tensor) -> Any:
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            target_n.copy_(source_n, non_blocking=True)
            return self._stream.record_event()

    def wait_on_device(self, done: Any) -> None:
        """The computation's stream waits."""
        self._module.current_stream().wait_event(done)

    def wait_on_host(self, done: Any) -> None:
        """This process waits."""
        done.synchronize()


def copies_of(device: torch.device) -> Copies:
    """How to copy to and from a device."""
    if device.type == "cpu":
        return DirectCopies()
    return StreamCopies(torch.get_device_module(device), device)

"""Kernels in Triton's interpreter, judged by the error that torch makes in the same dtype; and what a subject is.

A subject is a module of this folder, named in ``SUBJECTS``, with

- ``COMPILED``: sizes in words, and the arguments with which ``launch`` launches the kernels on meta tensors;
- ``CASES``: what ``judge`` runs in the interpreter, ``title`` its words;
- ``races``: on CPU, the seconds of what is compared (``Race``).
"""

import importlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from types import ModuleType
from typing import Any
from unittest import mock

import torch

SUBJECTS = ("cross_entropy", "gated", "heads", "rms_norm", "rope")
SLACK = 3.0
MOST_TRAFFIC = 1.1
"""Times the minimum."""


def subjects() -> list[ModuleType]:
    """Their modules."""
    return [importlib.import_module(f"benchmarks.kernels.{name}") for name in SUBJECTS]


@dataclass(frozen=True)
class Verdict:
    """Errors of all results against fp64, beside what each may be, and bytes an element."""

    errors: dict[str, tuple[float, float]]
    moved: float
    least: float
    """What must be moved."""

    @property
    def is_accurate(self) -> bool:
        """Within the yardstick."""
        return all(error <= most for error, most in self.errors.values())

    @property
    def worst(self) -> str:
        """The result whose error is the largest part of what it may be."""
        return max(self.errors, key=lambda each: self.errors[each][0] / (self.errors[each][1] or 1.0))

    @property
    def is_lean(self) -> bool:
        """Within 1.1 times the least traffic."""
        return self.moved <= MOST_TRAFFIC * self.least


class Interpreted:
    """A process in which Triton is interpreted: TRITON_INTERPRET is set before its first import, and stays in there."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}):
            self._pool.submit(os.getpid).result()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)`` in there; raises what it raises."""
        return self._pool.submit(function, *args).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


@dataclass(frozen=True)
class Race:
    """On CPU, one thread: seconds of ours and of what it is compared with."""

    name: str
    ours: float
    reference: float
    reference_name: str
    target: float
    """Ours takes at most this part of it."""


def seconds_of(*functions: Callable[[], Any], rounds: int = 7) -> list[float]:
    """Median seconds of each, run in turns on one thread; the first round warms up."""
    before, found = torch.get_num_threads(), [[] for _ in functions]
    torch.set_num_threads(1)
    try:
        for _ in range(rounds + 1):
            for function, times in zip(functions, found, strict=True):
                started = time.perf_counter()
                function()
                times.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return [statistics.median(times[1:]) for times in found]


def measure(got: torch.Tensor, same: torch.Tensor, truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """The kernel's error and what it may be: thrice torch's in the same dtype, and rounding."""
    assert torch.isfinite(got).all(), "not finite"
    eps, found = torch.finfo(got.dtype).eps, {}
    sizes: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {
        "max": (lambda x: x.abs().max(), eps),
        "rms": (lambda x: x.square().mean().sqrt(), eps / 2),
    }
    for metric, (size, rounding) in sizes.items():
        ours, theirs = (size(each.double() - truth).item() for each in (got, same))
        found[metric] = (ours, SLACK * theirs + rounding * size(truth).item())
    if got.dim() == 0:  # one number: torch's may be right by luck
        return {"max": (found["max"][0], found["max"][1] + eps * truth.abs().item())}
    return found


def errors_of(
    names: Sequence[str], got: Sequence[Any], same: Sequence[Any], truth: Sequence[Any]
) -> dict[str, tuple[float, float]]:
    """``measure`` of several results, by name and metric."""
    return {
        f"{name}, {metric}": pair
        for name, *three in zip(names, got, same, truth, strict=True)
        for metric, pair in measure(*three).items()
    }

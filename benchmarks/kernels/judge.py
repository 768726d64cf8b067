"""Tests of kernels in Triton's interpreter, by torch's own error in the same dtype; interface of a subject.

A subject is a module of this folder, named in ``SUBJECTS``, with

- ``COMPILED``: names of sizes, and the arguments with which ``launch`` launches the kernels on meta tensors;
- ``CASES``: cases, frozen dataclasses, that ``judge`` runs in the interpreter.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks.ranks import fork_context, interpreting

SUBJECTS = ("bf16", "cross_entropy", "gated", "heads")
SLACK = 3.0
MOST_TRAFFIC = 1.1
"""Limit relative to the minimum traffic."""


def subjects() -> list[ModuleType]:
    """Return the modules of all subjects."""
    return [importlib.import_module(f"benchmarks.kernels.{name}") for name in SUBJECTS]


def title(case: Any) -> str:
    """Describe a case by its fields without a default, and those that differ from it."""
    values = {each.name: getattr(case, each.name) for each in fields(case) if getattr(case, each.name) != each.default}
    return ", ".join(f"{name} {value}".replace("torch.", "") for name, value in values.items())


@dataclass(frozen=True)
class Verdict:
    """Errors of all results against fp64 with their limits, and bytes per element."""

    errors: dict[str, tuple[float, float]]
    moved: float
    least: float
    """Minimum bytes per element."""

    @property
    def is_accurate(self) -> bool:
        """True if all errors are within their limits."""
        return all(error <= most for error, most in self.errors.values())

    @property
    def worst(self) -> str:
        """Result whose error is the largest share of its limit."""
        return max(self.errors, key=lambda each: self.errors[each][0] / (self.errors[each][1] or 1.0))

    @property
    def is_lean(self) -> bool:
        """True if traffic is at most 1.1 times the minimum."""
        return self.moved <= MOST_TRAFFIC * self.least


class Interpreted:
    """Separate process that runs Triton's interpreter."""

    def __init__(self) -> None:
        with interpreting(), mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            self._pool = ProcessPoolExecutor(1, mp_context=fork_context())
            self._pool.submit(os.getpid).result()

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run ``function(*args)`` in the process; exceptions propagate."""
        return self._pool.submit(function, *args).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def bytes_of(traffic: Any) -> int:
    """Return the bytes moved by launches in the interpreter; 0 on a GPU, where they are not counted."""
    return 0 if traffic is None else traffic.read + traffic.written


def measure(got: torch.Tensor, same: torch.Tensor, truth: torch.Tensor) -> dict[str, tuple[float, float]]:
    """Return the kernel's error and its limit: three times torch's in the same dtype, plus rounding."""
    assert torch.isfinite(got).all(), "not finite"
    eps, found = torch.finfo(got.dtype).eps, {}
    sizes: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {
        "max": (lambda x: x.abs().max(), eps),
        "rms": (lambda x: x.square().mean().sqrt(), eps / 2),
    }
    for metric, (size, rounding) in sizes.items():
        ours, theirs = (size(each.double() - truth).item() for each in (got, same))
        found[metric] = (ours, SLACK * theirs + rounding * size(truth).item())
    if got.dim() == 0:  # for a scalar, torch's error may be near 0 by chance
        return {"max": (found["max"][0], found["max"][1] + eps * truth.abs().item())}
    return found


def errors_of(
    names: Sequence[str], got: Sequence[Any], same: Sequence[Any], truth: Sequence[Any]
) -> dict[str, tuple[float, float]]:
    """Apply ``measure`` to several results; keys are name and metric."""
    return {
        f"{name}, {metric}": pair
        for name, *three in zip(names, got, same, truth, strict=True)
        for metric, pair in measure(*three).items()
    }

"""Run-time checks that two functions compute the same, before one replaces the other; their one tolerance policy.

Where the rounding error of the reference is measured, SLACK times that is allowed; elsewhere half of a dtype's digits.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from deepspeed_alst.core.threads import on_same_device

SLACK = 3.0
"""Multiple of a measured rounding error that still counts as rounding."""


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative difference that counts as rounding: 1.5e-8 in fp64, 3.5e-4 in fp32, 0.09 in bf16.

    Long sums err by far less; another formula or factor is off by more.
    """
    return torch.finfo(dtype).eps ** 0.5


def run_isolated(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a thread of its own, out of reach of the caller's modes, hooks, autocast and ``no_grad``."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(on_same_device(function), *args).result()


def result_or_none(check: Callable[..., Any], *args: Any) -> Any:
    """Return the result of an isolated check; None if the program's code cannot run on the given tensors."""

    def run() -> Any:
        with torch.random.fork_rng(devices=[]):
            return check(*args)

    try:
        return run_isolated(run)
    except Exception:  # foreign code may raise anything; it then stays in place
        return None


def random_tensors() -> Callable[..., torch.Tensor]:
    """Return a function that draws random CPU tensors, the same in every process, from its own generator."""
    generator = torch.Generator().manual_seed(4_001)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@contextlib.contextmanager
def without_zero_weights(module: torch.nn.Module) -> Iterator[None]:
    """Give weights that are all zero random values inside the context: a gate or an adapter starts so and hides a path.

    In place, by ``data``, whose changes autograd does not count.
    """
    draw, kinds = random_tensors(), (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    zero = [each.data for each in module.parameters() if each.dtype in kinds and not each.any()]
    try:
        for weight in zero:
            weight.copy_(draw(*weight.shape))
        yield
    finally:
        for weight in zero:
            weight.zero_()


def agrees(found: Any, expected: torch.Tensor) -> bool:
    """Return True if two tensors match in dtype, shape and, beside the largest value, within the tolerance."""
    if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return bool(((found - expected).abs() <= tolerance(expected.dtype) * expected.abs().max()).all())


def is_equivalent(function: Callable[..., Any], reference: Callable[..., Any], inputs: tuple[Any, ...]) -> bool:
    """Return True if two functions agree on copies of inputs, and in the gradients of those that require one."""

    def copied(x: Any) -> Any:
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    def run(each: Callable[..., Any]) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        arguments, draw = tree_map(copied, inputs), random_tensors()
        outputs = [x for x in tree_leaves(each(*arguments)) if isinstance(x, torch.Tensor)]
        leaves = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]
        return outputs, torch.autograd.grad(outputs, leaves, [draw(*x.shape).to(x) for x in outputs])

    (found, found_grads), (expected, expected_grads) = run(function), run(reference)
    if len(found) != len(expected):
        return False
    return all(map(agrees, [*found, *found_grads], [*expected, *expected_grads]))

"""Check at run time that two functions compute the same, on tensors of their own, before one replaces the other."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map


def run_isolated(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a thread of its own, out of reach of the caller's modes, hooks, autocast and ``no_grad``."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


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


def allclose_ulp(found: Any, expected: torch.Tensor, ulps: int) -> bool:
    """Return True if two tensors match in dtype, shape and, within ``ulps`` eps of the largest, value."""
    if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    most = ulps * torch.finfo(expected.dtype).eps * expected.abs().max()
    return bool(((found - expected).abs() <= most).all())


def is_equivalent(
    function: Callable[..., Any], reference: Callable[..., Any], inputs: tuple[Any, ...], ulps: int, grad_ulps: int
) -> bool:
    """Return True if two functions agree on inputs, which are copied, and in the gradients of those that require one.

    Outputs may differ by ``ulps`` eps of the largest, gradients by ``grad_ulps``.
    """

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
    limits = [ulps] * len(found) + [grad_ulps] * len(found_grads)
    pairs = zip([*found, *found_grads], [*expected, *expected_grads], limits, strict=True)
    return all(allclose_ulp(*each) for each in pairs)


def is_plain(x: Any) -> bool:
    """Return True if ``x`` is a tensor with its own memory, not a traceable wrapper subclass."""
    return isinstance(x, torch.Tensor) and not torch.utils._python_dispatch.is_traceable_wrapper_subclass(x)

"""The cross-entropy kernel in Triton's interpreter, judged by the error that torch makes in the same dtype.

Legend: t rows of a tile, V vocabulary.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.interpreter import faithful

SLACK = 3.0
MOST_TRAFFIC = 1.1
"""Times the minimum."""


@dataclass(frozen=True)
class Case:
    """One launch."""

    t: int
    V: int
    dtype: torch.dtype
    label_smoothing: float = 0.0
    softcap: float = 0.0
    logit_scale: float = 1.0
    gap: int = 0
    """Elements between the end of a row and the next; they are NaN."""


@dataclass(frozen=True)
class Verdict:
    """Errors of the loss and the gradient against fp64, beside what each may be, and bytes an element."""

    errors: dict[str, tuple[float, float]]
    moved: float
    least: float

    @property
    def is_accurate(self) -> bool:
        """Within the yardstick."""
        return all(error <= most for error, most in self.errors.values())

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


def judge(case: Case) -> Verdict:
    """Run one launch and compare; a gradient that is written elsewhere, or not everywhere, is an error of its own."""
    from deepspeed_alst.kernels.cross_entropy import cross_entropy_, cross_entropy_reference

    torch.manual_seed(0)
    storage = torch.full((case.t, case.V + case.gap), torch.nan, dtype=case.dtype)
    logits_tV = storage[:, : case.V]
    logits_tV.copy_(3 * torch.randn(case.t, case.V))
    labels_t = torch.randint(0, case.V, (case.t,))
    labels_t[2::5] = -100
    scale = torch.tensor(0.37)
    options = (case.label_smoothing, case.softcap, case.logit_scale)
    results = {}
    for name, dtype in (("truth", torch.float64), ("torch", case.dtype)):
        grad_tV = logits_tV.to(dtype, copy=True)
        results[name] = (cross_entropy_reference(grad_tV, labels_t, scale, *options), grad_tV)
    with faithful() as traffic:
        loss = cross_entropy_(logits_tV, labels_t, scale, *options)
    assert storage[:, case.V :].isnan().all(), "it wrote between the rows"
    errors = {}
    for index, got in ((0, loss), (1, logits_tV)):
        of_one = measure(got, results["torch"][index], results["truth"][index])
        errors |= {f"{('loss', 'gradient')[index]}, {metric}": pair for metric, pair in of_one.items()}
    # Each row is read for its normaliser, read again and written; its label is read, and its loss written.
    least = 3 * logits_tV.numel() * case.dtype.itemsize + labels_t.nbytes + 4 * case.t
    return Verdict(errors, (traffic.read + traffic.written) / logits_tV.numel(), least / logits_tV.numel())


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


def tile_peak(backend: str, tile_tokens: int | None) -> int:
    """Bytes beyond the weights that logits and loss of 32K tokens need, on fake tensors: Llama-3.1-8B's head."""
    import dataclasses

    from benchmarks.tiles.loss import FAKE, peak_beyond_weights, run
    from deepspeed_alst.blocks import TiledLossBlock

    budget = TiledLossBlock.model_validate({"backend": backend, "tile_tokens": tile_tokens})
    return peak_beyond_weights(run(dataclasses.replace(FAKE, budget=budget), "ours", 1.0).ledger)


def in_a_model(model: torch.nn.Module, batch: dict[str, torch.Tensor], backend: str, undo: ExitStack) -> Any:
    """Loss and gradients of a model whose loss is tiled by this backend."""
    from deepspeed_alst.blocks import TiledLossBlock
    from deepspeed_alst.models.calls import Calls
    from deepspeed_alst.models.tiled_loss import replace_whole_loss, tile_loss

    tile_loss(model, TiledLossBlock(backend=backend, tile_tokens=13), Calls(), lambda module: None, undo)
    replace_whole_loss(model, undo)
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    (loss * 0.37).backward()
    return loss.detach(), {name: param.grad.clone() for name, param in model.named_parameters()}

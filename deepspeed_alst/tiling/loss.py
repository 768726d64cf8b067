"""Tiled logits, loss and gradients in one pass: the logits of the whole sequence never exist.

Each tile's logits become the gradient of its summed cross-entropy, and that the gradients of the hidden states and
the head's weights. The backward scales them by the upstream gradient (mean, gradient accumulation, loss scaling).
Rows without a label are skipped. The head's weights get one gradient per pass, summed over tiles in fp32.

With ``on_the_way`` a kernel computes a tile's gradient in place of its logits (kernels/cross_entropy.py, or Liger's
by kernels/liger.py); without it, torch does.

Legend: T rows (tokens, flat), t rows of a tile, H hidden size, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.random_draws.draw_mode import Branch
from deepspeed_alst.tiling.weight_gradients import WeightGradients, refuse_foreign_weights, without_hooks

# Per logit: the head's output and its gradient in two bytes each, and three fp32 values in between.
_BYTES_PER_LOGIT = 16
# The kernel needs one value for both, fp32 at most.
_BYTES_IN_PLACE = 4
_FEWEST_ROWS = 64
_BLOCK = 2**24

Logits = Callable[[torch.Tensor], torch.Tensor]
CrossEntropy = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``[t, V], [t], [] -> [], [t, V]``: the summed loss of a tile, and its gradient times a scale."""


@dataclass(frozen=True)
class OnTheWay:
    """Logit steps before the loss that the kernel supports: a scale, then a softcap."""

    logit_scale: float = 1.0
    softcap: float = 0.0
    """0 disables it."""
    by_liger: bool = False
    """True to use Liger's kernel, which has no scale, instead of this package's."""


def _draw_nothing(tile: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def loss_tile_rows(budget: TiledLossConfig, vocab: int, in_place: bool = False) -> int:
    """Return the rows of a tile whose logits fit in the budget, at least 64, or the user's ``tile_tokens``."""
    bytes_per_logit = _BYTES_IN_PLACE if in_place else _BYTES_PER_LOGIT
    return budget.tile_tokens or max(_FEWEST_ROWS, budget.tile_bytes // (bytes_per_logit * vocab))


def tiled_loss(
    logits: Logits,
    weights: Sequence[torch.nn.Parameter],
    hidden_TH: torch.Tensor,
    labels_T: torch.Tensor,
    scale: torch.Tensor,
    tile_rows: int,
    label_smoothing: float = 0.0,
    on_the_way: OnTheWay | None = None,
    drawing: Branch = _draw_nothing,
) -> torch.Tensor:
    """Compute the summed cross-entropy of labelled rows, times ``scale``: ``[T, H], [T], [] -> []`` in fp32 or fp64.

    Args:
        logits: ``[t, H] -> [t, V]``, the head and all steps on its output.
        weights: the weights that ``logits`` uses; trainable ones get a gradient.
        hidden_TH: input of the head.
        labels_T: shifted already; rows labelled -100 are dropped before the matrix product.
        scale: 1/N of the mean, applied to the logits' gradient before rounding, as without tiles; after it in fp16,
            for range.
        tile_rows: rows of a tile, at least 1.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        on_the_way: steps on the output of ``logits``; the kernel applies them and computes loss and gradient.
        drawing: context in which ``logits`` draws random numbers.

    Raises:
        DataError: with the kernel, if a label is not a token id.
    """
    wanted, cross_entropy = torch.is_grad_enabled(), _by_torch(label_smoothing)
    if on_the_way is not None:
        make = _by_liger if on_the_way.by_liger else _by_kernel
        cross_entropy = make(label_smoothing, on_the_way, labels_T, wanted)
    if not wanted:
        total = _sum_of_tiles(logits, drawing, hidden_TH, labels_T, tile_rows, cross_entropy)
        return total * scale.to(total)
    return _TiledLoss.apply(logits, drawing, hidden_TH, labels_T, scale, tile_rows, cross_entropy, *weights)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Logits,
        drawing: Branch,
        hidden_TH: torch.Tensor,
        labels_T: torch.Tensor,
        scale: torch.Tensor,
        tile_rows: int,
        cross_entropy: CrossEntropy,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.need_hidden, ctx.need_weights = ctx.needs_input_grad[2], ctx.needs_input_grad[7:]
        trained = [weight for weight, need in zip(weights, ctx.need_weights, strict=True) if need]
        kept = _labelled_rows(labels_T)
        parts = kept.split(tile_rows)
        sums = WeightGradients(trained, len(parts), fp32=True)
        grad_TH = torch.zeros_like(hidden_TH) if ctx.need_hidden else None
        total = _zero(hidden_TH)
        scale = scale.to(total)
        before = torch.ones_like(scale) if hidden_TH.dtype == torch.float16 else scale
        ctx.after = scale / before
        for part in parts:
            leaf = hidden_TH[part].detach().requires_grad_(ctx.need_hidden)
            with torch.enable_grad(), drawing(part):
                logits_tV = logits(leaf)
            loss, grad_tV = cross_entropy(logits_tV, labels_T[part], before)
            total += loss
            if part is parts[0]:
                refuse_foreign_weights([logits_tV], (leaf, *weights), "The head")
            wanted = [leaf, *trained] if ctx.need_hidden else trained
            found = ()
            if wanted:
                with without_hooks(trained), torch.autocast(hidden_TH.device.type, enabled=False):
                    found = torch.autograd.grad(logits_tV, wanted, grad_tV, allow_unused=True)
            del logits_tV, grad_tV
            if grad_TH is not None:
                grad_TH[part] = found[0]
            sums.add(found[len(found) - len(trained) :])
        ctx.dtypes = [weight.dtype for weight in trained]
        ctx.save_for_backward(*(each for each in (grad_TH, *sums.sums()) if each is not None))
        ctx.is_used = [each is not None for each in sums.sums()]
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        factor = factor * ctx.after
        of_hidden = _scaled(saved_hidden := next(saved), factor, saved_hidden.dtype) if ctx.need_hidden else None
        of_trained = iter(
            [
                _scaled(next(saved), factor, dtype) if used else None
                for dtype, used in zip(ctx.dtypes, ctx.is_used, strict=True)
            ]
        )
        return (
            None,
            None,
            of_hidden,
            None,
            None,
            None,
            None,
            *(next(of_trained) if need else None for need in ctx.need_weights),
        )


def _sum_of_tiles(
    logits: Logits,
    drawing: Branch,
    hidden_TH: torch.Tensor,
    labels_T: torch.Tensor,
    tile_rows: int,
    cross_entropy: CrossEntropy,
) -> torch.Tensor:
    total = _zero(hidden_TH)
    for part in _labelled_rows(labels_T).split(tile_rows):
        with drawing(part):
            logits_tV = logits(hidden_TH[part])
        total += cross_entropy(logits_tV, labels_T[part], torch.ones_like(total))[0]
    return total


def _by_kernel(smoothing: float, on_the_way: OnTheWay, labels_T: torch.Tensor, gradient: bool) -> CrossEntropy:
    """Return a cross-entropy in place of the logits, computed in fp32 for any logits dtype."""
    # Imported here to load Triton only if tiles are used.
    from deepspeed_alst.kernels.cross_entropy import check_labels, cross_entropy_

    lowest, highest = _range_of(labels_T)

    def of_tile(
        logits_tV: torch.Tensor, labels_t: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_labels(lowest, highest, logits_tV.shape[1])
        grad_tV = _to_overwrite(logits_tV)
        softcap, logit_scale = on_the_way.softcap, on_the_way.logit_scale
        return cross_entropy_(grad_tV, labels_t, scale, smoothing, softcap, logit_scale, gradient), grad_tV

    return of_tile


def _by_liger(smoothing: float, on_the_way: OnTheWay, labels_T: torch.Tensor, gradient: bool) -> CrossEntropy:
    """Return Liger's cross-entropy; its gradient factor is read on the host, once for all tiles."""
    from deepspeed_alst.kernels.cross_entropy import check_labels, cross_entropy_
    from deepspeed_alst.kernels.liger import liger_cross_entropy_

    assert on_the_way.logit_scale == 1, "Liger's kernel has no scale"
    lowest, highest = _range_of(labels_T)
    read: list[tuple[torch.Tensor, float]] = []

    def of_tile(
        logits_tV: torch.Tensor, labels_t: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_labels(lowest, highest, logits_tV.shape[1])
        grad_tV, softcap = _to_overwrite(logits_tV), on_the_way.softcap
        if grad_tV.dtype == torch.float64:  # Liger computes in fp32
            return cross_entropy_(grad_tV, labels_t, scale, smoothing, softcap, gradient=gradient), grad_tV
        if gradient and (not read or read[0][0] is not scale):
            read[:] = [(scale, 1 / scale.item())]
        divisor = read[0][1] if gradient else 1.0
        return liger_cross_entropy_(grad_tV, labels_t, divisor, smoothing, softcap, gradient), grad_tV

    return of_tile


def _range_of(labels_T: torch.Tensor) -> tuple[int, int]:
    """Return the lowest and the highest label."""
    # Right after the sync for the labelled rows, and only once for all tiles.
    known_T = labels_T.where(labels_T != IGNORED_LABEL, 0)
    lowest, highest = torch.stack(known_T.aminmax()).tolist() if known_T.numel() else (0, 0)
    return lowest, highest


def _to_overwrite(logits_tV: torch.Tensor) -> torch.Tensor:
    """Return the logits if nothing else needs them, else a copy."""
    from deepspeed_alst.kernels.cross_entropy import has_own_rows

    # tanh and similar ops save their result for the backward; any other use raises by the version counter.
    if has_own_rows(logits_tV) and not hasattr(logits_tV.grad_fn, "_saved_result"):
        return logits_tV.detach()
    return logits_tV.detach().clone(memory_format=torch.contiguous_format)


def _by_torch(smoothing: float) -> CrossEntropy:
    def of_tile(
        logits_tV: torch.Tensor, labels_t: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, grad_tV = _cross_entropy(logits_tV.detach(), labels_t, smoothing)
        grad_tV *= scale
        return loss, grad_tV.to(logits_tV.dtype)

    return of_tile


def _cross_entropy(
    logits_tV: torch.Tensor, labels_t: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the summed loss of a tile and its gradient with respect to the logits ``[t, V]``."""
    # A copy, as the graph may hold the logits; becomes the gradient in place. logsumexp briefly needs another one.
    values_tV = logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32), copy=True)
    t, V = values_tV.shape
    target_t1 = labels_t.unsqueeze(1)
    norm_t1 = values_tV.logsumexp(1, keepdim=True)
    loss_t1 = norm_t1 - (1 - smoothing) * values_tV.gather(1, target_t1)
    if smoothing:
        loss_t1 -= smoothing * values_tV.mean(1, keepdim=True)
    grad_tV = values_tV.sub_(norm_t1).exp_()
    grad_tV.scatter_add_(1, target_t1, grad_tV.new_full((t, 1), smoothing - 1.0))
    if smoothing:
        grad_tV -= smoothing / V
    return loss_t1.sum(), grad_tV


def _labelled_rows(labels_T: torch.Tensor) -> torch.Tensor:
    return (labels_T != IGNORED_LABEL).nonzero().flatten()


def _zero(hidden: torch.Tensor) -> torch.Tensor:
    return hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Compute ``gradient * factor`` in ``dtype`` by blocks, without a full copy in the sums' dtype."""
    result = torch.empty_like(gradient, dtype=dtype)
    for source, target in zip(gradient.flatten().split(_BLOCK), result.flatten().split(_BLOCK), strict=True):
        target.copy_(source.to(torch.promote_types(source.dtype, factor.dtype)) * factor)
    return result

"""Tiled logits, loss and gradients in one pass: the logits of the whole sequence never exist.

Each tile's logits become the gradient of its summed cross-entropy, and that the gradients of the hidden states and
the head's weights. The backward scales them by the upstream gradient (mean, gradient accumulation, loss scaling).

Legend: T rows (tokens, flat), t rows of a tile, H hidden size, V vocabulary.
"""

import contextlib
import math
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
_HIDDEN, _NUM_OTHERS = 3, 6  # places among the arguments of _TiledLoss: hidden states, the first weight

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""``[t, V], [t] -> [], [t, V]``: the summed loss of a tile, and its gradient times a scale."""
Step = tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]
"""A function of the logits, its arguments before and after them, and its keyword arguments."""


@dataclass(frozen=True)
class OnTheWay:
    """Logit steps before the loss that a kernel applies (kernels/cross_entropy.py): a scale, then a softcap."""

    logit_scale: float = 1.0
    softcap: float = 0.0
    """0 disables it."""
    by_liger: bool = False
    """True to use Liger's kernel, which has no scale, instead of this package's."""


def on_the_way(steps: Sequence[Step]) -> OnTheWay | None:
    """Return the steps as ``cap * tanh(scale * x / cap)`` or ``scale * x``; None for any other form.

    Casts to fp32 are dropped: the kernel computes in fp32.
    """
    scale, cap = 1.0, None
    for function, before, after, keywords in steps:
        name, given = function.__name__.strip("_"), (*before, *after)
        if name == "tanh" and cap is None and not given and not keywords:
            cap = 1.0
            continue
        if name == "float" or (name == "to" and (*given, *keywords.values()) == (torch.float32,)):
            continue
        if keywords or len(given) != 1 or type(given[0]) not in (int, float) or not given[0]:
            return None
        if name in ("mul", "multiply", "rmul"):
            factor = given[0]
        elif name in ("div", "divide", "true_divide", "truediv") and after:
            factor = 1.0 / given[0]
        else:
            return None
        scale, cap = (scale * factor, None) if cap is None else (scale, cap * factor)
    if cap is None:
        return OnTheWay(scale)
    return OnTheWay(scale * cap, cap) if 0 < cap < math.inf else None


def loss_tile_rows(budget: TiledLossConfig, vocab: int, in_place: bool = False) -> int:
    """Return the rows of a tile whose logits fit in the budget, at least 64, or the user's ``tile_tokens``."""
    bytes_per_logit = _BYTES_IN_PLACE if in_place else _BYTES_PER_LOGIT
    return budget.tile_tokens or max(_FEWEST_ROWS, budget.tile_bytes // (bytes_per_logit * vocab))


def tiled_loss(
    logits: Callable[[torch.Tensor], torch.Tensor],
    weights: Sequence[torch.nn.Parameter],
    hidden_TH: torch.Tensor,
    labels_T: torch.Tensor,
    scale: torch.Tensor,
    tile_rows: int,
    label_smoothing: float = 0.0,
    kernel: OnTheWay | None = None,
    drawing: Branch = lambda tile: contextlib.nullcontext(),
) -> torch.Tensor:
    """Compute the summed cross-entropy of labelled rows, times ``scale``: ``[T, H], [T], [] -> []`` in fp32 or fp64.

    Args:
        logits: ``[t, H] -> [t, V]``, the head and the steps on its output that torch runs.
        weights: the weights that ``logits`` uses; trainable ones get a gradient, summed over tiles in fp32.
        hidden_TH: input of the head.
        labels_T: shifted already; rows labelled -100 are dropped before the matrix product.
        scale: 1/N of the mean, applied to the logits' gradient before rounding, as without tiles; in fp16 after it.
        tile_rows: rows of a tile, at least 1.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        kernel: the other steps, for a kernel that computes loss and gradient; None to use torch.
        drawing: context in which ``logits`` draws random numbers.

    Raises:
        DataError: with a kernel, if a label is not a token id.
    """
    needs_grad = torch.is_grad_enabled()
    scale = scale.to(hidden_TH.device, torch.promote_types(hidden_TH.dtype, torch.float32))
    before = torch.ones_like(scale) if hidden_TH.dtype == torch.float16 else scale
    if kernel is None:
        cross_entropy = _by_torch(label_smoothing, before, needs_grad)
    else:
        cross_entropy = _by_kernel(label_smoothing, before, needs_grad, kernel, labels_T)

    def run(part: torch.Tensor, x_tH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with torch.set_grad_enabled(needs_grad), drawing(part):
            logits_tV = logits(x_tH)
        return logits_tV, *cross_entropy(logits_tV, labels_T[part])

    parts = (labels_T != IGNORED_LABEL).nonzero().flatten().split(tile_rows)
    return _TiledLoss.apply(run, parts, needs_grad, hidden_TH, scale, scale / before, *weights)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
        parts: Sequence[torch.Tensor],
        needs_grad: bool,
        hidden_TH: torch.Tensor,
        scale: torch.Tensor,
        after: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        needs = [needs_grad and each for each in ctx.needs_input_grad]
        ctx.need_weights, ctx.after = needs[_NUM_OTHERS:], after
        trained = [weight for weight, need in zip(weights, ctx.need_weights, strict=True) if need]
        sums = WeightGradients(trained, len(parts), fp32=True)
        grad_TH = torch.zeros_like(hidden_TH) if needs[_HIDDEN] else None
        total = torch.zeros_like(scale)
        for part in parts:
            leaf = hidden_TH[part].detach().requires_grad_(grad_TH is not None)
            logits_tV, loss, grad_tV = run(part, leaf)
            total += loss
            if part is parts[0]:
                refuse_foreign_weights([logits_tV], (leaf, *weights), "The head")
            wanted = trained if grad_TH is None else [*trained, leaf]
            if not wanted:
                continue
            found = gradient = None  # frees those of the last tile
            with without_hooks(trained), torch.autocast(hidden_TH.device.type, enabled=False):
                found = torch.autograd.grad(logits_tV, wanted, grad_tV, allow_unused=True)
            del logits_tV, grad_tV
            if grad_TH is not None:
                grad_TH[part] = found[-1]
            for weight, gradient in zip(trained, found, strict=False):
                sums.add(weight, gradient)
        ctx.dtypes = [hidden_TH.dtype, *(weight.dtype for weight in trained)]
        ctx.save_for_backward(grad_TH, *sums.sums())
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        factor = factor * ctx.after
        scaled = (_scaled(each, factor, dtype) for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        of_hidden = next(scaled)
        of_weights = [next(scaled) if need else None for need in ctx.need_weights]
        return (*[None] * _HIDDEN, of_hidden, *[None] * (_NUM_OTHERS - _HIDDEN - 1), *of_weights)


def _scaled(gradient: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Compute ``gradient * factor`` in ``dtype`` by blocks, without a full copy in the sums' dtype."""
    if gradient is None:
        return None
    result = torch.empty_like(gradient, dtype=dtype)
    for source, target in zip(gradient.flatten().split(_BLOCK), result.flatten().split(_BLOCK), strict=True):
        target.copy_(source.to(torch.promote_types(source.dtype, factor.dtype)) * factor)
    return result


def _by_torch(smoothing: float, scale: torch.Tensor, needs_grad: bool) -> CrossEntropy:
    """Return a cross-entropy in fp32 at least, with two such values a logit at a time, where autograd has four."""

    def of_tile(logits_tV: torch.Tensor, labels_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        # A copy, as the graph may hold the logits; becomes the gradient in place.
        values_tV = logits_tV.detach().to(torch.promote_types(logits_tV.dtype, torch.float32), copy=True)
        target_t1, norm_t1 = labels_t.unsqueeze(1), values_tV.logsumexp(1, keepdim=True)
        loss_t1 = norm_t1 - (1 - smoothing) * values_tV.gather(1, target_t1)
        if smoothing:
            loss_t1 -= smoothing * values_tV.mean(1, keepdim=True)
        if not needs_grad:
            return loss_t1.sum(), None
        grad_tV = values_tV.sub_(norm_t1).exp_()
        grad_tV.scatter_add_(1, target_t1, torch.full_like(loss_t1, smoothing - 1.0))
        if smoothing:
            grad_tV -= smoothing / grad_tV.shape[1]
        grad_tV *= scale
        return loss_t1.sum(), grad_tV.to(logits_tV.dtype)

    return of_tile


def _by_kernel(
    smoothing: float, scale: torch.Tensor, needs_grad: bool, kernel: OnTheWay, labels_T: torch.Tensor
) -> CrossEntropy:
    """Return a kernel's cross-entropy in place of the logits, computed in fp32 for any logits dtype."""
    # Imported here to load Triton only if tiles are used.
    from deepspeed_alst.kernels.cross_entropy import check_labels, cross_entropy_

    # Read on the host once for all tiles.
    known_T = labels_T.where(labels_T != IGNORED_LABEL, 0)
    lowest, highest = torch.stack(known_T.aminmax()).tolist() if known_T.numel() else (0, 0)
    if kernel.by_liger:
        from deepspeed_alst.kernels.cross_entropy import liger_cross_entropy_

        assert kernel.logit_scale == 1, "Liger's kernel has no scale"
        divisor = 1 / scale.item() if needs_grad else 1.0

    def of_tile(logits_tV: torch.Tensor, labels_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_labels(lowest, highest, logits_tV.shape[1])
        grad_tV, softcap = _to_overwrite(logits_tV), kernel.softcap
        if kernel.by_liger and grad_tV.dtype != torch.float64:  # Liger computes in fp32
            return liger_cross_entropy_(grad_tV, labels_t, divisor, smoothing, softcap, needs_grad), grad_tV
        loss = cross_entropy_(grad_tV, labels_t, scale, smoothing, softcap, kernel.logit_scale, needs_grad)
        return loss, grad_tV

    return of_tile


def _to_overwrite(logits_tV: torch.Tensor) -> torch.Tensor:
    """Return the logits if nothing else needs them, else a copy."""
    from deepspeed_alst.kernels.cross_entropy import has_own_rows

    # tanh and similar ops save their result for the backward; any other use raises by the version counter.
    if has_own_rows(logits_tV) and not hasattr(logits_tV.grad_fn, "_saved_result"):
        return logits_tV.detach()
    return logits_tV.detach().clone(memory_format=torch.contiguous_format)

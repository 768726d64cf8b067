"""Logits, loss and gradients in one pass over tiles, without the logits of the full sequence.

A tile's logits become the gradient of its summed cross-entropy, and this the gradients of the hidden states and the
head's weights. The backward scales those by the upstream gradient (mean, gradient accumulation, loss scaling).

Legend: T rows (tokens, flat), t rows of a tile, H hidden size, V vocabulary.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.config.schema import TiledLossConfig
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.random_draws.draw_mode import Branch
from deepspeed_alst.tiling.weight_gradients import WeightGradients, refuse_foreign_weights, without_hooks

# Per logit: the head's output and its gradient in two bytes each, and three fp32 values in between.
_BYTES_PER_LOGIT = 16
# A kernel overwrites the logits, fp32 at most, with their gradient.
_BYTES_IN_PLACE = 4
_MIN_ROWS = 64
_BLOCK = 2**24
_HIDDEN, _NUM_OTHERS = 3, 6  # positions in the arguments of _TiledLoss: hidden states, the first weight

CrossEntropy = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""``[t, V], [t] -> [], [t, V]``: the summed loss of a tile, and its gradient times a scale."""
LogitOps = Sequence[tuple[Callable[..., Any], tuple[Any, ...], tuple[Any, ...], dict[str, Any]]]
"""Functions of the logits, each with its arguments before and after them and its keyword arguments."""


@dataclass(frozen=True)
class LogitTransform:
    """Logit ops that the loss kernel applies (kernels/cross_entropy.py): a scale, then a softcap."""

    logit_scale: float = 1.0
    softcap: float = 0.0
    """0 disables it."""
    use_liger: bool = False
    """True to use Liger's kernel, which has no scale, instead of this package's."""


def fuse_ops(ops: LogitOps) -> LogitTransform | None:
    """Return the ops as ``cap * tanh(scale * x / cap)`` or ``scale * x``; None for any other form.

    Casts to fp32 are dropped, because the kernel computes in fp32.
    """
    scale, cap = 1.0, None
    for function, before, after, keywords in ops:
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
        return LogitTransform(scale)
    return LogitTransform(scale * cap, cap) if 0 < cap < math.inf else None


def loss_tile_rows(budget: TiledLossConfig, vocab: int, in_place: bool = False) -> int:
    """Return the rows of a tile whose logits fit in the budget, at least 64, or the user's ``tile_tokens``."""
    bytes_per_logit = _BYTES_IN_PLACE if in_place else _BYTES_PER_LOGIT
    return budget.tile_tokens or max(_MIN_ROWS, budget.tile_bytes // (bytes_per_logit * vocab))


def tiled_loss(
    logits: Callable[[torch.Tensor], torch.Tensor],
    weights: Sequence[torch.nn.Parameter],
    hidden_TH: torch.Tensor,
    labels_T: torch.Tensor,
    scale: torch.Tensor,
    tile_rows: int,
    label_smoothing: float = 0.0,
    kernel: LogitTransform | None = None,
    draws: Branch = lambda tile: contextlib.nullcontext(),
) -> torch.Tensor:
    """Compute the summed cross-entropy of labelled rows, times ``scale``: ``[T, H], [T], [] -> []`` in fp32 or fp64.

    Args:
        logits: ``[t, H] -> [t, V]``, the head and the ops on its output that torch runs.
        weights: weights that ``logits`` uses; trainable ones get a gradient, summed over tiles in fp32.
        hidden_TH: input of the head.
        labels_T: shifted labels; rows labelled -100 are dropped before the matrix product.
        scale: 1/N of the mean, applied to the logits' gradient before rounding, as without tiles; in fp16 after it.
        tile_rows: rows of a tile, at least 1.
        label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        kernel: the other ops, applied by a kernel that computes loss and gradient; None to use torch.
        draws: context in which ``logits`` draws random numbers.

    Raises:
        DataError: a kernel is used, and a label is outside the vocabulary.
    """
    needs_grad = torch.is_grad_enabled()
    scale = scale.to(hidden_TH.device, torch.promote_types(hidden_TH.dtype, torch.float32))
    before = torch.ones_like(scale) if hidden_TH.dtype == torch.float16 else scale
    cross_entropy: CrossEntropy = partial(_torch_cross_entropy, label_smoothing, before, needs_grad)
    if kernel is not None:
        cross_entropy = _kernel_cross_entropy(label_smoothing, before, needs_grad, kernel, labels_T)

    def run(tile: torch.Tensor, x_tH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with torch.set_grad_enabled(needs_grad), draws(tile):
            logits_tV = logits(x_tH)
        return logits_tV, *cross_entropy(logits_tV, labels_T[tile])

    tiles = (labels_T != IGNORED_LABEL).nonzero().flatten().split(tile_rows)
    return _TiledLoss.apply(run, tiles, needs_grad, hidden_TH, scale, scale / before, *weights)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]],
        tiles: Sequence[torch.Tensor],
        needs_grad: bool,
        hidden_TH: torch.Tensor,
        scale: torch.Tensor,
        after: torch.Tensor,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        needs = [needs_grad and each for each in ctx.needs_input_grad]
        ctx.need_weights, ctx.after = needs[_NUM_OTHERS:], after
        trained = [weight for weight, need in zip(weights, ctx.need_weights, strict=True) if need]
        sums = WeightGradients(trained, len(tiles), fp32=True)
        grad_TH = torch.zeros_like(hidden_TH) if needs[_HIDDEN] else None
        total = torch.zeros_like(scale)
        for tile in tiles:
            leaf = hidden_TH[tile].detach().requires_grad_(grad_TH is not None)
            logits_tV, loss, grad_tV = run(tile, leaf)
            total += loss
            if tile is tiles[0]:
                refuse_foreign_weights([logits_tV], (leaf, *weights), "The head")
            wanted = trained if grad_TH is None else [*trained, leaf]
            if not wanted:
                continue
            grads = gradient = None  # frees those of the last tile
            with without_hooks(trained), torch.autocast(hidden_TH.device.type, enabled=False):
                grads = torch.autograd.grad(logits_tV, wanted, grad_tV, allow_unused=True)
            del logits_tV, grad_tV
            if grad_TH is not None:
                grad_TH[tile] = grads[-1]
            for weight, gradient in zip(trained, grads, strict=False):
                sums.add(weight, gradient)
        ctx.dtypes = [hidden_TH.dtype, *(weight.dtype for weight in trained)]
        ctx.save_for_backward(grad_TH, *sums.sums())
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> tuple[Any, ...]:
        factor = factor * ctx.after
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = (_scale_in_blocks(each, factor, dtype) for each, dtype in pairs)
        grad_hidden = next(scaled)
        grad_weights = [next(scaled) if need else None for need in ctx.need_weights]
        return (*[None] * _HIDDEN, grad_hidden, *[None] * (_NUM_OTHERS - _HIDDEN - 1), *grad_weights)


def _scale_in_blocks(gradient: torch.Tensor | None, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Compute ``gradient * factor`` in ``dtype``, by blocks to avoid a full copy in the dtype of the sums."""
    if gradient is None:
        return None
    # Contiguous: a view, where flatten of other strides would be a copy.
    result = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    for source, target in zip(gradient.flatten().split(_BLOCK), result.view(-1).split(_BLOCK), strict=True):
        target.copy_(source.to(torch.promote_types(source.dtype, factor.dtype)) * factor)
    return result


def _torch_cross_entropy(
    smoothing: float, scale: torch.Tensor, needs_grad: bool, logits_tV: torch.Tensor, labels_t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute a tile in at least fp32, with two such values per logit at a time, where autograd has four."""
    # A copy, because the graph may hold the logits; it becomes the gradient in place.
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


def _kernel_cross_entropy(
    smoothing: float, scale: torch.Tensor, needs_grad: bool, kernel: LogitTransform, labels_T: torch.Tensor
) -> CrossEntropy:
    """Return a kernel's cross-entropy, which overwrites the logits and computes in fp32."""
    # Imported here to load Triton only if a kernel is used.
    from deepspeed_alst.kernels.cross_entropy import check_labels, cross_entropy_

    # One read from the device for all tiles.
    known_T = labels_T.where(labels_T != IGNORED_LABEL, 0)
    lowest, highest = torch.stack(known_T.aminmax()).tolist() if known_T.numel() else (0, 0)
    if kernel.use_liger:
        from deepspeed_alst.kernels.cross_entropy import liger_cross_entropy_

        assert kernel.logit_scale == 1, "Liger's kernel has no scale"
        divisor = 1 / scale.item() if needs_grad else 1.0

    def cross_entropy(logits_tV: torch.Tensor, labels_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        check_labels(lowest, highest, logits_tV.shape[1])
        grad_tV, softcap = _writable_logits(logits_tV), kernel.softcap
        if kernel.use_liger and grad_tV.dtype != torch.float64:  # Liger computes in fp32
            return liger_cross_entropy_(grad_tV, labels_t, divisor, smoothing, softcap, needs_grad), grad_tV
        loss = cross_entropy_(grad_tV, labels_t, scale, smoothing, softcap, kernel.logit_scale, needs_grad)
        return loss, grad_tV

    return cross_entropy


def _writable_logits(logits_tV: torch.Tensor) -> torch.Tensor:
    """Return the logits if nothing else needs their values, else a copy."""
    from deepspeed_alst.kernels.cross_entropy import has_writable_rows

    # tanh and similar ops save their result for the backward; autograd's version counter detects any other use.
    if has_writable_rows(logits_tV) and not hasattr(logits_tV.grad_fn, "_saved_result"):
        return logits_tV.detach()
    return logits_tV.detach().clone(memory_format=torch.contiguous_format)

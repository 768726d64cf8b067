"""DeepSpeed's ``TiledMLP`` and ``TiledFusedLogitsLoss``, under their signatures, as plain checkpointed tiles.

A tile is computed under ``torch.utils.checkpoint``, so that one tile's intermediates live at a time. Autograd sums the
tiles before a weight's gradient is handed on: each weight gets its gradient once a pass, scaled by what comes in from
behind. DeepSpeed 0.19.8 runs the loss's backward inside its forward, where the factor of gradient accumulation is not
known, and divides by the tiles asked for where fewer were made.

Legend: B batch, S sequence as it comes in, T = B*S tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from deepspeed_alst.errors import ShapeError


def tiled_mlp(
    fn: Callable[[Any, torch.Tensor], torch.Tensor],
    module: Any,
    x: torch.Tensor,
    shards: int,
    compute_params: Sequence[torch.nn.Parameter] | None = None,
) -> torch.Tensor:
    """``fn(module, x)`` on tiles of the tokens: ``[..., S, M] -> [..., S, M']``, at most ``shards`` of them.

    ``compute_params`` is accepted and not needed: autograd knows the weights.
    """
    outputs = [checkpoint(fn, module, tile, use_reentrant=False) for tile in torch.chunk(x, shards, dim=-2)]
    return torch.cat(outputs, dim=-2)


def tiled_logits_loss(
    fn: Callable[..., torch.Tensor],
    module: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    mask: torch.Tensor | None,
    shards: int,
    compute_params: Sequence[torch.nn.Parameter] | None,
    output_reduction: str,
) -> torch.Tensor:
    """The sum or mean of ``fn(module, x, y)`` over tiles of the tokens: ``[B, S, ...], [B, S, ...] -> []``.

    ``fn`` gets rows of all samples, ``[T', ...]``, and a piece of ``mask`` as a third tensor where there is one. "mean"
    divides by the tiles that were made, at most ``shards``.

    Raises:
        ShapeError: an unknown reduction, or shapes that do not fit together.
    """
    _check_loss_call(x, y, mask, output_reduction)
    rows = [x, y] if mask is None else [x, y, mask]
    tiles = zip(*(torch.chunk(each.flatten(0, 1), shards) for each in rows), strict=True)
    losses = torch.stack([checkpoint(fn, module, *tile, use_reentrant=False) for tile in tiles])
    return losses.mean() if output_reduction == "mean" else losses.sum()


def _check_loss_call(x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None, reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ShapeError(f"TiledFusedLogitsLoss: output_reduction={reduction!r} is unknown; use 'mean' or 'sum'")
    if x.dim() < 2 or y.dim() < 2 or x.shape[:2] != y.shape[:2]:
        raise ShapeError(
            f"TiledFusedLogitsLoss: x {list(x.shape)} and y {list(y.shape)} must both start with [batch, sequence]"
        )
    if mask is not None and mask.shape != x.shape[:2]:
        raise ShapeError(
            f"TiledFusedLogitsLoss: mask {list(mask.shape)} must be [batch, sequence], here {list(x.shape[:2])}"
        )

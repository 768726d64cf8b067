"""DeepSpeed's ``TiledMLP`` and ``TiledFusedLogitsLoss``, same signatures, as plain checkpointed tiles.

Each tile runs under ``torch.utils.checkpoint``, so that only one tile's intermediates exist at a time. Autograd sums
a weight's gradient over the tiles: each weight gets one gradient per pass, scaled by the upstream gradient. DeepSpeed
0.19.8 runs the loss's backward inside its forward, where the gradient accumulation factor is unknown, and divides by
the requested number of tiles even if fewer were made.

Legend: B batch, S sequence of the input, T = B*S tokens.
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
    """Compute ``fn(module, x)`` in at most ``shards`` tiles of tokens: ``[..., S, M] -> [..., S, M']``.

    ``compute_params`` is accepted but unused: autograd tracks the weights.
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
    """Compute the sum or mean of ``fn(module, x, y)`` over tiles of tokens: ``[B, S, ...], [B, S, ...] -> []``.

    ``fn`` gets rows of all samples, ``[T', ...]``, and a tile of ``mask`` as a third tensor if there is one. "mean"
    divides by the actual number of tiles, at most ``shards``.

    Raises:
        ShapeError: an unknown reduction, or mismatched shapes.
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

"""Causal attention on whole sequences with a window, chunks or packed documents, by torch's sdpa.

A sequence falls into stretches that do not attend to one another (documents, chunks), each computed separately; one
longer than its window is computed in blocks of query rows with only the keys of their band. So a packed batch costs
what its documents cost, and a window of W tokens the scores of 2W keys per row; the only mask is a block's.

Legend: B batch, S whole sequence, h query heads, k KV heads, g = h/k, D head dim; N rows, of a batch or of stretches of
the same length; L length of a stretch; W window; R query rows of a block.
"""

import torch
import torch.nn.functional as F

from deepspeed_alst.sequence_parallel.mask_spec import MaskSpec

_LEAST_ROWS = 64
"""Minimum rows of a block; fewer would leave a kernel's tile half empty."""
_MASK_ELEMENTS = 2**26
"""Maximum elements of a block's mask: 128 MiB in half precision. Up to W = 5,792 a block has W rows."""
_SPAN = 2**16
"""Query rows per span, which bounds the backward's gradients of the blocks' overlapping keys."""


def attend(
    q_BhSD: torch.Tensor,
    k_BkSD: torch.Tensor,
    v_BkSD: torch.Tensor,
    mask: MaskSpec | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend under a mask, or causally without one: ``[B, h, S, D], 2 x [B, k, S, D] -> [B, h, S, D]``.

    Head size of v may differ. Every sdpa backend that supports the pieces may run them.
    """
    if mask is None:
        return _causal(q_BhSD, k_BkSD, v_BkSD, scaling, dropout)
    runs = mask.runs(q_BhSD.shape[2])
    sizes = [run.count * run.length for run in runs]
    outputs = []
    # The backward of split is one cat; that of each slice would be a gradient of the whole sequence.
    for run, *qkv in zip(runs, *(x.split(sizes, dim=2) for x in (q_BhSD, k_BkSD, v_BkSD)), strict=True):
        q, k, v = (_stretches_to_rows(x, run.count) for x in qkv)
        banded = mask.window is not None and mask.window < run.length
        out = _banded(q, k, v, mask.window, scaling, dropout) if banded else _causal(q, k, v, scaling, dropout)
        outputs.append(_rows_to_stretches(out, run.count))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, dropout: float) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scaling, enable_gqa=gqa)


def _stretches_to_rows(x_BhSD: torch.Tensor, count: int) -> torch.Tensor:
    """Fold stretches into rows: ``[B, h, count * L, D] -> [B * count, h, L, D]``; a view if B is 1."""
    return x_BhSD if count == 1 else x_BhSD.unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def _rows_to_stretches(x_NhLD: torch.Tensor, count: int) -> torch.Tensor:
    return x_NhLD if count == 1 else x_NhLD.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)


def _banded(
    q_NhLD: torch.Tensor,
    k_NkLD: torch.Tensor,
    v_NkLD: torch.Tensor,
    window: int,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attend within stretches longer than the window: ``[N, h, L, D], 2 x [N, k, L, D] -> [N, h, L, D]``."""
    length = q_NhLD.shape[2]
    rows = min(_rows_of_block(window), length - window)
    mask_Rj = _band(rows, window, q_NhLD)
    span = max(1, _SPAN // rows) * rows
    starts = range(window, length, span)
    sizes = [min(span, length - start) for start in starts]
    first, *others = q_NhLD.split([window, *sizes], dim=2)
    # The first W rows attend to all tokens before them.
    outputs = [_causal(first, k_NkLD[:, :, :window], v_NkLD[:, :, :window], scaling, dropout)]
    for start, q in zip(starts, others, strict=True):
        keys = slice(start - window, start + q.shape[2])
        outputs.append(_attend_span(q, k_NkLD[:, :, keys], v_NkLD[:, :, keys], mask_Rj, scaling, dropout))
    return torch.cat(outputs, dim=2)


def _rows_of_block(window: int) -> int:
    """Return the rows of a block: W, where half of the scores count, unless its mask would be too large."""
    rows = max(window, _LEAST_ROWS)
    while rows > _LEAST_ROWS and rows * (rows + window) > _MASK_ELEMENTS:
        rows //= 2
    return rows


def _band(rows: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask of a block, ``[R, W + R]``; its keys begin W tokens before its rows."""
    row = torch.arange(rows, device=like.device)[:, None]
    key = torch.arange(window + rows, device=like.device)
    hidden = (key <= row) | (key > row + window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _attend_span(
    q_NhMD: torch.Tensor,
    k_NkMD: torch.Tensor,
    v_NkMD: torch.Tensor,
    mask_Rj: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attend from M query rows to their M + W keys.

    With a mask, sdpa's kernels do not support head groups, and copies of the KV heads would be g times as large. So one
    KV head runs at a time, expanded to its query heads without a copy.
    """
    group = q_NhMD.shape[1] // k_NkMD.shape[1]
    if group == 1:
        return _attend_blocks(q_NhMD, k_NkMD, v_NkMD, mask_Rj, scaling, dropout)
    per_kv_head = zip(q_NhMD.split(group, 1), k_NkMD.split(1, 1), v_NkMD.split(1, 1), strict=True)
    return torch.cat([_attend_blocks(*qkv, mask_Rj, scaling, dropout) for qkv in per_kv_head], dim=1)


def _attend_blocks(
    q_NgMD: torch.Tensor,
    k_NxMD: torch.Tensor,
    v_NxMD: torch.Tensor,
    mask_Rj: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attend for heads with one KV head each or one for all: all full blocks at once, then the rest."""
    rows, keys = mask_Rj.shape
    window = keys - rows
    count, left = divmod(q_NgMD.shape[2], rows)
    outputs = []
    blocks, rest = q_NgMD.split([count * rows, left], dim=2)
    if count:
        k, v = (_overlapping(x, count, rows, window) for x in (k_NxMD, v_NxMD))
        out = _under_mask(_stretches_to_rows(blocks, count), k, v, mask_Rj, scaling, dropout)
        outputs.append(_rows_to_stretches(out, count))
    if left:
        k, v = (x[:, :, -left - window :] for x in (k_NxMD, v_NxMD))
        outputs.append(_under_mask(rest, k, v, mask_Rj[:left, : window + left], scaling, dropout))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _overlapping(x_NxMD: torch.Tensor, count: int, rows: int, window: int) -> torch.Tensor:
    """Return each block's keys, overlapping by W: ``[N * count, x, W + R, D]``; a view if N is 1."""
    of_blocks = x_NxMD[:, :, : window + count * rows].unfold(2, window + rows, rows)
    return of_blocks.permute(0, 2, 1, 4, 3).flatten(0, 1)


def _under_mask(
    q_NgRD: torch.Tensor,
    k_NxjD: torch.Tensor,
    v_NxjD: torch.Tensor,
    mask_Rj: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    group = q_NgRD.shape[1]
    k, v = (x.expand(-1, group, -1, -1) for x in (k_NxjD, v_NxjD))
    return F.scaled_dot_product_attention(q_NgRD, k, v, mask_Rj, dropout, scale=scaling)

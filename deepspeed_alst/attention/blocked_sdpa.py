"""Causal attention on whole sequences with a window, chunks or packed documents, by torch's sdpa.

Documents and chunks are computed separately, a longer window's stretch in blocks of query rows with the keys of their
band. Legend: B batch, S whole sequence, h query heads, k KV heads, g = h/k, D head dim; N rows, of a batch or of
stretches of the same length; L length of a stretch; W window; R query rows of a block; M = rows of a span; j = W + R.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel

from deepspeed_alst.attention.hf_attention import causal_sdpa
from deepspeed_alst.attention.hf_masks import MaskSpec

_MIN_ROWS = 64
"""Minimum rows of a block; fewer would leave a kernel's tile half empty."""
_MASK_ELEMENTS = 2**26
"""Maximum elements of a block's mask: 128 MiB in half precision. Up to W = 5,792 a block has W rows."""
_SPAN = 2**16
"""Query rows per span, which bounds the backward's gradients of the blocks' overlapping keys."""


def attend(
    q_BhSD: torch.Tensor,
    k_BkSD: torch.Tensor,
    v_BkSD: torch.Tensor,
    mask: MaskSpec,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attend under a mask: ``[B, h, S, D], 2 x [B, k, S, D] -> [B, h, S, D]``. Head size of v may differ."""
    if hasattr(mask, "images"):  # multimodal/hf_image_masks.py
        return mask.attend(q_BhSD, k_BkSD, v_BkSD, scaling, dropout)
    runs = mask.runs(q_BhSD.shape[2])
    sizes = [count * length for count, length in runs]
    outputs = []
    # The backward of split is one cat; that of each slice would be a gradient of the whole sequence.
    split = (x.split(sizes, dim=2) for x in (q_BhSD, k_BkSD, v_BkSD))
    with _flash_first(q_BhSD.device.type):
        for (count, length), *qkv in zip(runs, *split, strict=True):
            q, k, v = (_stretches_to_rows(x, count) for x in qkv)
            if mask.window is not None and mask.window < length:
                out = _banded(q, k, v, mask.window, scaling, dropout)
            else:
                out = causal_sdpa(q, k, v, scaling, dropout)
            outputs.append(_rows_to_stretches(out, count))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _flash_first(kind: str) -> contextlib.AbstractContextManager[None]:
    """Prefer flash attention to cuDNN's, torch's first choice on an H100, which compiles for each new length: 0.4 s."""
    if kind != "cuda":
        return contextlib.nullcontext()
    order = sorted(_cur_sdpa_kernel_backends(), key=lambda each: (each == SDPBackend.MATH, each.value))
    return sdpa_kernel(order, set_priority=True)


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
    """Attend within stretches longer than the window: ``[N, h, L, D], 2 x [N, k, L, D] -> [N, h, L, D]``.

    With a mask, sdpa's kernels do not support head groups, and copies of the KV heads would be g times as large. So one
    KV head runs at a time, expanded to its query heads without a copy.
    """
    length, group = q_NhLD.shape[2], q_NhLD.shape[1] // k_NkLD.shape[1]
    mask_Rj = _band(min(_rows_of_block(window), length - window), window, q_NhLD)
    span = max(1, _SPAN // len(mask_Rj)) * len(mask_Rj)
    starts = range(window, length, span)
    first, *others = q_NhLD.split([window, *(min(span, length - start) for start in starts)], dim=2)
    # The first W rows attend to all tokens before them.
    outputs = [causal_sdpa(first, k_NkLD[:, :, :window], v_NkLD[:, :, :window], scaling, dropout)]
    for start, q in zip(starts, others, strict=True):
        keys = slice(start - window, start + q.shape[2])
        k, v = k_NkLD[:, :, keys], v_NkLD[:, :, keys]
        if group == 1:
            outputs.append(_attend_span(q, k, v, mask_Rj, scaling, dropout))
            continue
        per_kv_head = zip(q.split(group, 1), k.split(1, 1), v.split(1, 1), strict=True)
        outputs.append(torch.cat([_attend_span(*qkv, mask_Rj, scaling, dropout) for qkv in per_kv_head], dim=1))
    return torch.cat(outputs, dim=2)


def _rows_of_block(window: int) -> int:
    """Return the rows of a block: W, where half of the scores count, unless its mask would be too large."""
    rows = max(window, _MIN_ROWS)
    while rows > _MIN_ROWS and rows * (rows + window) > _MASK_ELEMENTS:
        rows //= 2
    return rows


def _band(rows: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask of a block, ``[R, W + R]``; its keys begin W tokens before its rows."""
    row = torch.arange(rows, device=like.device)[:, None]
    key = torch.arange(window + rows, device=like.device)
    hidden = (key <= row) | (key > row + window)
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def _attend_span(
    q_NgMD: torch.Tensor,
    k_NxMD: torch.Tensor,
    v_NxMD: torch.Tensor,
    mask_Rj: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Attend from M query rows to their M + W keys, of one KV head each or one for all: full blocks, then the rest."""
    rows, keys = mask_Rj.shape
    window, (count, rest) = keys - rows, divmod(q_NgMD.shape[2], rows)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling)

    def overlapping(x_NxMD: torch.Tensor) -> torch.Tensor:  # [N * count, x, j, D], a view if N is 1
        blocks = x_NxMD[:, :, : window + count * rows].unfold(2, keys, rows)
        return blocks.permute(0, 2, 1, 4, 3).flatten(0, 1)

    q_blocks, q_rest = q_NgMD.split([count * rows, rest], dim=2)
    outputs = []
    if count:
        out = run(_stretches_to_rows(q_blocks, count), overlapping(k_NxMD), overlapping(v_NxMD), mask_Rj)
        outputs.append(_rows_to_stretches(out, count))
    if rest:
        k, v = (x[:, :, -rest - window :] for x in (k_NxMD, v_NxMD))
        outputs.append(run(q_rest, k, v, mask_Rj[:rest, : window + rest]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def attend_all_pairs(
    q_BhSD: torch.Tensor,
    k_BkSD: torch.Tensor,
    v_BkSD: torch.Tensor,
    mask: MaskSpec | None,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the full score matrix, soft-cap and sinks ``[h]``: for trials of about a hundred tokens."""
    q, S = q_BhSD, q_BhSD.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k_BkSD, v_BkSD))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~(mask or MaskSpec()).seen(S, q.device), -torch.inf)
    if s_aux is not None:  # sinks take part in the softmax, without a value
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    return scores.float().softmax(-1).to(v.dtype)[..., :S] @ v

"""What the stand-ins of flash attention have in common: the checks of the real ones, and the definition of attention.

Legend: B batch, S sequence, T tokens of all documents, H query heads, K kv heads, D head dim.
"""

import math
import operator
from typing import Any

import torch

CALLS: list[dict[str, Any]] = []
"""What each call was given, tensors left out."""


def dense(kind: str, q_BSHD, k_BSKD, v_BSKD, scale, causal, left, softcap, sink_H=None) -> torch.Tensor:
    """The function for sequences of one length: ``[B, S, H, D]`` to the same."""
    CALLS.append({"kind": kind, "length": q_BSHD.shape[1], "left": left, "softcap": softcap})
    _check(q_BSHD, k_BSKD, v_BSKD, dims=4)
    return _attend(q_BSHD, k_BSKD, v_BSKD, scale, causal, left, softcap, sink_H)


def varlen(
    kind: str, q_THD, k_TKD, v_TKD, bounds_q, bounds_k, longest_q, longest_k, scale, causal, left, softcap, sink_H=None
) -> torch.Tensor:
    """The function for documents one after the other: ``[T, H, D]`` to the same."""
    CALLS.append({"kind": kind, "bounds": bounds_q.tolist(), "longest": longest_q, "left": left, "softcap": softcap})
    _check(q_THD, k_TKD, v_TKD, dims=3)
    for bounds, longest in ((bounds_q, longest_q), (bounds_k, longest_k)):
        assert bounds.dtype == torch.int32, "cu_seqlens must have dtype int32"
        assert bounds.is_contiguous() and bounds.device == q_THD.device
        # The kernels read no further than this: a document that is longer would be cut off in silence.
        assert int(bounds.diff().max()) <= operator.index(longest)
    assert bounds_q[0] == 0 and bounds_q[-1] == len(q_THD), "what is outside of all documents stays as it is"
    documents = zip(bounds_q.tolist(), bounds_q[1:].tolist(), strict=False)
    return torch.cat(
        [
            _attend(*(x[None, start:end] for x in (q_THD, k_TKD, v_TKD)), scale, causal, left, softcap, sink_H)[0]
            for start, end in documents
        ]
    )


def _check(q, k, v, dims: int) -> None:
    assert q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype"
    assert q.device == k.device == v.device
    assert q.dim() == k.dim() == v.dim() == dims
    assert q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    assert q.shape[-1] == k.shape[-1] <= 256 and q.shape[-1] % 8 == 0, "head_size must be a multiple of 8"
    assert q.shape[-2] % k.shape[-2] == 0, "heads in key/value must divide heads in query"


def repeated(x_BSKD: torch.Tensor, q_BSHD: torch.Tensor) -> torch.Tensor:
    """Key or value heads, one for each query head."""
    return x_BSKD.repeat_interleave(q_BSHD.shape[2] // x_BSKD.shape[2], dim=2)


def scores_of(q_BSHD, k_BSKD, scale, left, softcap) -> torch.Tensor:
    """``[B, H, S, S]``, those that are hidden at -inf: queries see themselves and ``left`` tokens before."""
    scores_BHSS = torch.einsum("bqhd,bkhd->bhqk", q_BSHD, repeated(k_BSKD, q_BSHD)) * scale
    if softcap:
        scores_BHSS = softcap * torch.tanh(scores_BHSS / softcap)
    S = q_BSHD.shape[1]
    behind_SS = torch.arange(S)[:, None] - torch.arange(S)
    hidden_SS = (behind_SS < 0) | (behind_SS > (left if left is not None and left >= 0 else S))
    return scores_BHSS.masked_fill(hidden_SS, -math.inf)


def _attend(q_BSHD, k_BSKD, v_BSKD, scale, causal, left, softcap, sink_H) -> torch.Tensor:
    """Softmax of all scores, as it is written down."""
    B, S, H, D = q_BSHD.shape
    assert causal, "under sequence parallelism attention is causal"
    scores_BHSS = scores_of(q_BSHD, k_BSKD, 1 / math.sqrt(D) if scale is None else scale, left, softcap)
    if sink_H is not None:
        assert sink_H.shape == (H,), f"a sink for each of the {H} query heads, not {list(sink_H.shape)}"
        scores_BHSS = torch.cat([scores_BHSS, sink_H.view(1, H, 1, 1).expand(B, H, S, 1)], dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", scores_BHSS.softmax(-1)[..., :S], repeated(v_BSKD, q_BSHD))

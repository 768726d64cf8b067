"""Flash attention 2 as flash-attn 2.8.3 has it: registered operators with the real signatures, and autograd above them.

The operators run on CPU in plain PyTorch. As in the real ones, heads are padded to a multiple of 8, the forward returns
output, log-sum-exp, an empty softmax and a seed, and the backward is made from the output and the log-sum-exp that it
is given. Their namespace is not the real one, as that of the hub's builds is not.

Legend: B batch, S sequence, T tokens of all documents, H query heads, K kv heads, D head dim.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.nn.functional as F

from tests.stand_ins import attend

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@contextmanager
def registered() -> Iterator[None]:
    """Have the stand-ins of flash attention run as operators."""
    with mock.patch.object(attend, "dense", _dense), mock.patch.object(attend, "varlen", _varlen):
        yield


def _dense(kind, q, k, v, scale, causal, left, softcap, sink_H=None):
    attend.CALLS.append({"kind": kind, "length": q.shape[1], "left": left, "softcap": softcap})
    return _Attention.apply(q, k, v, (), scale, causal, left, softcap)


def _varlen(kind, q, k, v, bounds_q, bounds_k, longest_q, longest_k, scale, causal, left, softcap, sink_H=None):
    attend.CALLS.append({"kind": kind, "bounds": bounds_q.tolist(), "left": left, "softcap": softcap})
    return _Attention.apply(q, k, v, (bounds_q, bounds_k, longest_q, longest_k), scale, causal, left, softcap)


@torch.library.custom_op("stand_in_of_flash_attn::_flash_attn_forward", mutates_args=())
def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> Four:
    out, log_sum_exp = _forward(q, k, v, softmax_scale, window_size_left, softcap)
    return out, log_sum_exp, q.new_empty(0), torch.zeros(2, dtype=torch.int64)


@torch.library.custom_op("stand_in_of_flash_attn::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> Four:
    pairs = [
        _forward(*(x[None, start:end] for x in (q, k, v)), softmax_scale, window_size_left, softcap)
        for start, end in itertools.pairwise(cu_seqlens_q.tolist())
    ]
    out_THD = torch.cat([out[0] for out, _ in pairs])
    return out_THD, torch.cat([lse[0] for _, lse in pairs], dim=1), q.new_empty(0), torch.zeros(2, dtype=torch.int64)


class _Attention(torch.autograd.Function):
    """flash-attn's FlashAttnFunc, ``[B, S, H, D]`` to the same; with lengths FlashAttnVarlenFunc, ``[T, H, D]``."""

    @staticmethod
    def forward(ctx, q, k, v, lengths, scale, causal, left, softcap):
        ops, scale = torch.ops.stand_in_of_flash_attn, q.shape[-1] ** -0.5 if scale is None else scale
        ctx.head_size, padded = q.shape[-1], [_padded(x) for x in (q, k, v)]
        attention = ops._flash_attn_varlen_forward if lengths else ops._flash_attn_forward
        # Without dropout, slopes and a softmax to return.
        out, lse, *_ = attention(*padded, *lengths, 0.0, scale, causal, left, left, softcap, None, False)
        ctx.save_for_backward(*padded, out, lse)
        ctx.bounds, ctx.arguments = lengths[0].tolist() if lengths else None, (scale, left, softcap)
        return out[..., : ctx.head_size]

    @staticmethod
    def backward(ctx, do):
        *padded, out, lse = ctx.saved_tensors
        tensors = _padded(do), *padded, out
        if ctx.bounds is None:
            grads = _backward(*tensors, lse, *ctx.arguments)
        else:
            documents = [slice(*each) for each in itertools.pairwise(ctx.bounds)]
            of_each = [_backward(*(x[None, d] for x in tensors), lse[None, :, d], *ctx.arguments) for d in documents]
            grads = (torch.cat([x[0] for x in one]) for one in zip(*of_each, strict=True))
        return *(x[..., : ctx.head_size] for x in grads), *[None] * 5


def _padded(x):
    return F.pad(x, [0, -x.shape[-1] % 8])


def _forward(q_BSHD, k_BSKD, v_BSKD, scale, left, softcap):
    scores_BHSS = attend.scores_of(q_BSHD, k_BSKD, scale, left, softcap)
    lse_BHS = scores_BHSS.logsumexp(-1)
    weights_BHSS = (scores_BHSS - lse_BHS[..., None]).exp()
    return torch.einsum("bhqk,bkhd->bqhd", weights_BHSS, attend.repeated(v_BSKD, q_BSHD)), lse_BHS


def _backward(do_BSHD, q_BSHD, k_BSKD, v_BSKD, out_BSHD, lse_BHS, scale, left, softcap):
    groups = q_BSHD.shape[2] // k_BSKD.shape[2]
    k_BSHD, v_BSHD = (attend.repeated(x, q_BSHD) for x in (k_BSKD, v_BSKD))
    scores_BHSS = attend.scores_of(q_BSHD, k_BSKD, scale, left, softcap)
    p_BHSS = (scores_BHSS - lse_BHS[..., None]).exp()
    delta_BHS = (do_BSHD * out_BSHD).sum(-1).transpose(1, 2)
    ds_BHSS = p_BHSS * (torch.einsum("bqhd,bkhd->bhqk", do_BSHD, v_BSHD) - delta_BHS[..., None])
    if softcap:
        ds_BHSS = ds_BHSS * (1 - (scores_BHSS.masked_fill(p_BHSS == 0, 0) / softcap).square())
    ds_BHSS = ds_BHSS * scale
    dk_BSHD, dv_BSHD = (
        torch.einsum("bhqk,bqhd->bkhd", x, y).unflatten(2, (-1, groups)).sum(3)
        for x, y in ((ds_BHSS, q_BSHD), (p_BHSS, do_BSHD))
    )
    return torch.einsum("bhqk,bkhd->bqhd", ds_BHSS, k_BSHD), dk_BSHD, dv_BSHD

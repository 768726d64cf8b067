"""Stands in for flash attention 4: the arguments of its interface that are not for inference alone."""

from tests.stand_ins import attend


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
):
    """``[B, S, H, D]`` to the same; like the real one it returns a pair."""
    out = attend.dense("4", q, k, v, softmax_scale, causal, window_size[0], softcap, learnable_sink)
    return out, None


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_q=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
):
    """``[T, H, D]`` to the same; like the real one it returns a pair."""
    assert seqused_q is None and seqused_k is None and page_table is None
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out = attend.varlen("4 varlen", q, k, v, *lengths, softmax_scale, causal, window_size[0], softcap, learnable_sink)
    return out, None

"""Stands in for flash attention 3: names, order and defaults of its arguments are those of its hopper interface."""

from tests.stand_ins import attend


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """``[B, S, H, D]`` to the same."""
    assert qv is None and not attention_chunk and not return_attn_probs
    return attend.dense("3", q, k, v, softmax_scale, causal, window_size[0], softcap, deterministic=deterministic)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """``[T, H, D]`` to the same."""
    assert qv is None and not attention_chunk and not return_attn_probs and seqused_q is None and seqused_k is None
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend.varlen("3 varlen", q, k, v, *lengths, softmax_scale, causal, window_size[0], softcap)


def flash_attn_with_kvcache(q, k_cache, v_cache, **kwargs):
    """For generation."""
    raise AssertionError("training has no cache")

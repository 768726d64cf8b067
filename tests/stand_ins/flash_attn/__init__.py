"""Stands in for flash-attn 2.8.3: names, order and defaults of its arguments are those of its flash_attn_interface."""

from tests.stand_ins import attend

__version__ = "2.8.3"


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """``[B, S, H, D]`` to the same."""
    assert not dropout_p and alibi_slopes is None and not return_attn_probs
    return attend.dense("2", q, k, v, softmax_scale, causal, window_size[0], softcap, deterministic=deterministic)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """``[T, H, D]`` to the same."""
    assert not dropout_p and alibi_slopes is None and not return_attn_probs and block_table is None
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend.varlen("2 varlen", q, k, v, *lengths, softmax_scale, causal, window_size[0], softcap)


def flash_attn_with_kvcache(q, k_cache, v_cache, **kwargs):
    """For generation."""
    raise AssertionError("training has no cache")

"""Stands in for causal_conv1d, flash-linear-attention and mamba_ssm: kernels that are told where documents end.

Names, order and defaults of the arguments are those of causal_conv1d 1.5, fla-core 0.6 and mamba_ssm 2.2, less what
transformers has no use for. They refuse the layouts and dtypes that those refuse, and compute document by document with
transformers' functions in plain torch.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.qwen3_next import modeling_qwen3_next

_NAMES = {
    "causal_conv1d_fn": "causal_conv1d_fn",
    "torch_chunk_gated_delta_rule": "chunk_gated_delta_rule",
    "mamba2_chunk_scan": "mamba_chunk_scan_combined",
    "mamba2_split_conv1d_scan_combined": "mamba_split_conv1d_scan_combined",
}
CALLS: list[str] = []
"""Kernels that were called with documents."""


@contextmanager
def in_place_of_torch(modeling: Any) -> Iterator[None]:
    """Have a module of transformers find these kernels, as if they were installed."""
    CALLS.clear()
    with ExitStack() as undo:
        for name in _NAMES.keys() & vars(modeling).keys():
            plain = getattr(modeling, name).__wrapped__
            found = use_kernel_func_from_hub_with_fallback(_NAMES[name], __name__)(plain)
            undo.enter_context(mock.patch.object(modeling, name, found))
        yield


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """``[B, C, S]`` to the same."""
    assert activation in (None, "silu", "swish") and initial_states is None and not return_final_states
    if x.stride(1) == 1:
        assert not any(size % 8 for size in (x.shape[1], x.stride(0), x.stride(2)))
    if seq_idx is None:
        return _torch(modeling_mamba2.causal_conv1d_fn)(x, weight, bias, activation=activation)
    assert x.stride(1) == 1, "seq_idx is only for channels that are last in memory"

    def run(piece: slice) -> torch.Tensor:
        return _torch(modeling_mamba2.causal_conv1d_fn)(x[..., piece], weight, bias, activation=activation)

    return _by_document("conv", run, _starts(seq_idx, x.shape[0], x.shape[2]), -1)


def chunk_gated_delta_rule(
    q,
    k,
    v,
    g,
    beta,
    scale=None,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    cu_seqlens=None,
):
    """``[B, S, H, D]`` to the same, and no state."""
    assert scale is None and initial_state is None and not output_final_state and use_qk_l2norm_in_kernel

    def run(piece: slice) -> torch.Tensor:
        parts = [x[:, piece] for x in (q, k, v, g, beta)]
        return _torch(modeling_qwen3_next.torch_chunk_gated_delta_rule)(*parts, use_qk_l2norm_in_kernel=True)[0]

    if cu_seqlens is None:
        return run(slice(None)), None
    assert q.shape[0] == 1 and cu_seqlens[-1] == q.shape[1]
    return _by_document("delta rule", run, cu_seqlens.tolist(), 1), None


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
):
    """``[B, S, H, D]`` to the same."""
    assert z is None and initial_states is None and cu_seqlens is None and not return_final_states

    def run(piece: slice) -> torch.Tensor:
        rest = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
        parts = x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece]
        return _torch(modeling_mamba2.mamba2_chunk_scan)(*parts, chunk_size, **rest)

    if seq_idx is None:
        return run(slice(None))
    return _by_document("scan", run, _starts(seq_idx, *x.shape[:2]), 1)


def mamba_split_conv1d_scan_combined(zxbcdt, *args, **kwargs):
    """The whole layer at once: a rank that calls it takes its shard for the sequence."""
    raise AssertionError("a fused layer sees a shard only")


def _torch(function: Any) -> Callable[..., Any]:
    return getattr(function, "__wrapped__", function)


def _starts(seq_idx: torch.Tensor, rows: int, length: int) -> list[int]:
    assert seq_idx.dtype == torch.int32 and seq_idx.shape == (rows, length) == (1, length) and seq_idx.is_contiguous()
    return [0, *(seq_idx[0].diff().nonzero().flatten() + 1).tolist(), length]


def _by_document(name: str, run: Callable[[slice], torch.Tensor], cuts: list[int], dim: int) -> torch.Tensor:
    CALLS.append(name)
    return torch.cat([run(slice(first, last)) for first, last in itertools.pairwise(cuts)], dim)

"""Convolutions and scans of transformers' layers over a sequence sharded across ranks.

A layer's projections, gates and norms are token-wise: they run on the shard, with their own weights. Only a few
functions mix tokens; transformers has each as a kernel and in plain torch. In a sharded layer they run unchanged on the
part of the full sequence that they need: a convolution gets the few tokens before the shard, a scan the full sequence
of this rank's heads.

Legend: B batch, S full sequence, H heads, D head dim, G groups of heads with the same keys (or the same B and C), N
state, C channels, P ranks; lower case = this rank's share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.linear_attention.documents import ARGUMENTS, Documents, is_plain_torch
from deepspeed_alst.linear_attention.exchange import seq_to_head, with_tokens_before
from deepspeed_alst.sequence_parallel.head_plan import HeadPlan
from deepspeed_alst.sequence_parallel.ulysses import head_to_seq

Function = Callable[..., Any]
Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Split:
    """Shared state of one model's sharded functions."""

    group: Any
    documents: Documents = field(default_factory=Documents)

    @property
    def rank(self) -> int:
        """This rank's index in the sequence-parallel group."""
        return dist.get_rank(self.group)

    def plan(self, num_heads: int, num_groups: int) -> HeadPlan:
        """Return the assignment of heads to ranks."""
        return HeadPlan(dist.get_world_size(self.group), num_heads, num_groups)

    def to_heads(self, tensors: Tensors, copies: Sequence[int]) -> Tensors:
        """Exchange ``n x [B, s, H, D] -> n x [B, S, h, D]``; a tensor may have no D."""
        whole = seq_to_head([x if x.dim() == 4 else x.unsqueeze(-1) for x in tensors], copies, self.group)
        return [w if x.dim() == 4 else w.squeeze(-1) for x, w in zip(tensors, whole, strict=True)]

    def run(self, original: Function, call: Function, whole: Tensors, **documents: Callable[[], Any]) -> torch.Tensor:
        """Call a scan on full sequences ``[B, S, ...]``, each document separately.

        ``documents`` is the argument that passes the documents to a kernel.
        """
        if self.documents.bounds is None:
            return call(*whole)
        if not is_plain_torch(original):
            return call(*whole, **{name: make() for name, make in documents.items()})
        return self.documents.apart(lambda piece: call(*(x[:, piece] for x in whole)), 0, whole[0].shape[1], dim=1)


def convolution(original: Function, split: Split) -> Function:
    """Shard ``causal_conv1d_fn``: ``[B, C, s] -> [B, C, s]`` by weights ``[C, K]``, depthwise."""

    def causal_conv1d(
        hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        width = weight.shape[-1] - 1
        x_BCt = with_tokens_before(hidden_states, width, split.group)
        start, length = split.rank * hidden_states.shape[-1] - width, x_BCt.shape[-1]
        kwargs = _undocumented(kwargs)
        documents = split.documents
        if documents.bounds is None:
            out_BCt = original(x_BCt, weight, bias, **kwargs)
        elif is_plain_torch(original):
            out_BCt = documents.apart(
                lambda piece: original(x_BCt[..., piece], weight, bias, **kwargs), start, length, dim=-1
            )
        else:
            numbers = documents.numbers(start, length, x_BCt.device)
            out_BCt = original(x_BCt, weight, bias, seq_idx=numbers, **kwargs)
        return out_BCt[..., width:]

    return causal_conv1d


def delta_rule(original: Function, split: Split) -> Function:
    """Shard ``chunk_gated_delta_rule``, ``chunk_kda``: q, k ``[B, s, G, D]``, v ``[B, s, H, D]`` to v's shape."""

    def chunk_delta_rule(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        _refuse_states(kwargs)
        kwargs = _undocumented(kwargs)
        m = split.plan(value.shape[2], key.shape[2]).kv_replicas
        whole = split.to_heads([query, key, value, g, beta], (m, m, 1, 1, 1))

        def call(q: Any, k: Any, v: Any, g: Any, beta: Any, **documents: Any) -> torch.Tensor:
            return original(q, k, v, g=g, beta=beta, **documents, **kwargs)[0]

        out_BShD = split.run(original, call, whole, cu_seqlens=lambda: split.documents.bounds)
        return head_to_seq(out_BShD, split.group), None

    return chunk_delta_rule


def mamba2_scan(original: Function, split: Split) -> Function:
    """Shard ``mamba_chunk_scan_combined``: x ``[B, s, H, D]``, dt ``[B, s, H]``, B, C ``[B, s, G, N]`` to x's shape.

    A, D and dt_bias have a value per head, of which each rank takes its own.
    """

    def chunk_scan(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        _refuse_states(kwargs, z=z)
        plan = split.plan(hidden_states.shape[2], B.shape[2])
        heads = plan.heads_of(split.rank)
        mine = slice(heads.start, heads.stop)
        kwargs = _undocumented(kwargs)
        kwargs |= {name: x[mine] for name, x in (("D", D), ("dt_bias", dt_bias)) if x is not None}
        m = plan.kv_replicas
        whole = split.to_heads([hidden_states, dt, B, C], (1, 1, m, m))

        def call(x: Any, dt: Any, B: Any, C: Any, **documents: Any) -> torch.Tensor:
            return original(x, dt, A[mine], B, C, **documents, **kwargs)

        def numbers() -> torch.Tensor:
            return split.documents.numbers(0, whole[0].shape[1], dt.device)

        return head_to_seq(split.run(original, call, whole, seq_idx=numbers), split.group)

    return chunk_scan


def mamba_scan(original: Function, split: Split) -> Function:
    """Shard ``selective_scan_fn``: x, dt, z ``[B, C, s]``, B and C ``[B, N, s]`` to ``[B, C, s]``, per channel.

    A is ``[C, N]``, D and delta_bias ``[C]``, of which each rank takes its channels' values.
    """

    def selective_scan(
        hidden_states: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        D: torch.Tensor | None = None,
        z: torch.Tensor | None = None,
        delta_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        _refuse_states(kwargs)
        plan = split.plan(hidden_states.shape[1], 1)
        channels = plan.heads_of(split.rank)
        mine = slice(channels.start, channels.stop)
        kwargs |= {name: x[mine] for name, x in (("D", D), ("delta_bias", delta_bias)) if x is not None}
        m = plan.kv_replicas
        of_channels = [hidden_states, dt] if z is None else [hidden_states, dt, z]
        tensors = [*(x.transpose(1, 2) for x in of_channels), *(x.transpose(1, 2).unsqueeze(2) for x in (B, C))]
        whole = split.to_heads(tensors, [1] * len(of_channels) + [m, m])
        x, dt, *z_if_any = (w.transpose(1, 2) for w in whole[:-2])
        B, C = (w.squeeze(2).transpose(1, 2) for w in whole[-2:])
        out_BcS = original(x, dt, A[mine], B, C, z=z_if_any[0] if z_if_any else None, **kwargs)
        return head_to_seq(out_BcS.transpose(1, 2).unsqueeze(-1), split.group).squeeze(-1).transpose(1, 2)

    return selective_scan


def fused(original: Function, split: Split) -> Function:
    """Disable the fused projection, convolution, scan and norm: for None a layer calls its separate functions."""
    return lambda *args, **kwargs: None


def _undocumented(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in ARGUMENTS}


def _refuse_states(kwargs: dict[str, Any], **more: Any) -> None:
    """Raise on arguments of generation with a cache, which must bypass the sharded layers."""
    states = ("initial_state", "initial_states", "output_final_state", "return_final_states", "return_last_state")
    more |= {name: kwargs[name] for name in states if kwargs.get(name) not in (None, False)}
    given = [name for name, value in more.items() if value is not None]
    if given:
        raise UnsupportedModelError(f"a scan was called with {', '.join(given)}: not verified on a split sequence")

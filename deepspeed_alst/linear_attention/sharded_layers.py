"""Layers without attention on a shard: their own forwards, with token-mixing functions that see the full sequence.

A convolution gets a halo of tokens before the shard, a scan the full sequence of this rank's heads.
Legend: B batch, S full sequence, H heads, D head dim, G groups of heads with the same keys (or the same B and C), N
state (or documents), C channels, K kernel size, P ranks; lower case = this rank's share.
"""

import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.ulysses import HeadToSeq
from deepspeed_alst.core.forward_context import CACHES, ForwardContext
from deepspeed_alst.core.patching import PatchSet, copy_function
from deepspeed_alst.errors import ShapeError, UnsupportedModelError
from deepspeed_alst.linear_attention.exchange import prepend_halo, seq_to_head
from deepspeed_alst.linear_attention.layers import (
    TOKEN_MIXERS,
    Function,
    kernel_wrapper,
    linear_layers,
    mixing_functions,
)

Tensors = Sequence[torch.Tensor]

# Document arguments of transformers' layers, dropped because a rank's ``seq_idx`` covers its shard only.
_DOCUMENT_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx")


class ShardContext:
    """Group and packed documents of one model's sharded functions."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.cu_seqlens: Any = None
        """Document bounds of the current layer call, ``[N + 1]`` of the full sequence; None for a document per row."""

    def plan_heads(self, num_heads: int, num_groups: int) -> tuple[HeadPlan, slice]:
        """Return the split of heads and groups, and this rank's heads."""
        plan = HeadPlan(dist.get_world_size(self.group), num_heads, num_groups)
        if plan.row_groups > 1:
            raise ShapeError(
                f"{num_heads} heads of a scan cannot be split over sequence_parallel_size={plan.sp_size} ranks, each "
                f"of which needs one: use at most {num_heads}"
            )
        heads = plan.heads_of(dist.get_rank(self.group))
        return plan, slice(heads.start, heads.stop)

    def to_heads(self, tensors: Tensors, plan: HeadPlan) -> Tensors:
        """Exchange ``n x [B, s, H, D] -> n x [B, S, h, D]``; a tensor may have no D."""
        full = seq_to_head([x if x.dim() == 4 else x.unsqueeze(-1) for x in tensors], plan, self.group)
        return [w if x.dim() == 4 else w.squeeze(-1) for x, w in zip(tensors, full, strict=True)]

    def to_sequence(self, x_BShD: torch.Tensor, plan: HeadPlan) -> torch.Tensor:
        """Exchange ``[B, S, h, D] -> [B, s, H, D]``."""
        return HeadToSeq.apply(x_BShD.transpose(1, 2), x_BShD.shape[1] // plan.sp_size, plan, self.group)

    def document_ids(self, start: int, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the document number of each token along a dim from ``start`` on, ``[1, tokens]`` int32."""
        # Tokens before the sequence count as the first document's.
        positions = torch.arange(start, start + x.shape[dim], device=x.device).clamp(min=0)
        return torch.searchsorted(self.cu_seqlens[1:].to(positions), positions, right=True).int()[None]

    def by_document(self, function: Function, tensors: Tensors, start: int, dim: int) -> torch.Tensor:
        """Call a function per document and concatenate the results; ``start`` is the position of the first token."""
        length = tensors[0].shape[dim]
        inner = [bound - start for bound in self.cu_seqlens.tolist() if 0 < bound - start < length]
        sizes = [end - begin for begin, end in itertools.pairwise([0, *inner, length])]
        return torch.cat([function(*parts) for parts in zip(*(x.split(sizes, dim) for x in tensors), strict=True)], dim)

    def run_scan(self, original: Function, call: Function, full: Tensors, documents: str) -> torch.Tensor:
        """Call a scan on full sequences ``[B, S, ...]``, each document separately.

        ``documents`` names the kernel's argument for them, ``cu_seqlens`` or ``seq_idx``.
        """
        if self.cu_seqlens is None:
            return call(*full)
        if _is_plain_torch(original):
            return self.by_document(call, full, start=0, dim=1)
        value = self.cu_seqlens if documents == "cu_seqlens" else self.document_ids(0, full[0], dim=1)
        return call(*full, **{documents: value})


def convolution(original: Function, shard: ShardContext) -> Function:
    """Shard ``causal_conv1d_fn``: ``[B, C, s] -> [B, C, s]``, depthwise, by weights ``[C, K]``."""

    def causal_conv1d(
        hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        width, kwargs = weight.shape[-1] - 1, _without_documents(kwargs)
        x_BCt = prepend_halo(hidden_states, width, shard.group)
        start = dist.get_rank(shard.group) * hidden_states.shape[-1] - width
        if shard.cu_seqlens is not None and _is_plain_torch(original):
            out_BCt = shard.by_document(lambda x: original(x, weight, bias, **kwargs), [x_BCt], start, dim=-1)
            return out_BCt[..., width:]
        if shard.cu_seqlens is not None:
            kwargs["seq_idx"] = shard.document_ids(start, x_BCt, dim=-1)
        return original(x_BCt, weight, bias, **kwargs)[..., width:]

    return causal_conv1d


def delta_rule(original: Function, shard: ShardContext) -> Function:
    """Shard ``chunk_gated_delta_rule``, ``chunk_kda``: q, k ``[B, s, G, D]``, v ``[B, s, H, D]`` to v's shape."""

    def chunk_delta_rule(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        _refuse_states(kwargs)
        kwargs = _without_documents(kwargs)
        plan, _ = shard.plan_heads(value.shape[2], key.shape[2])
        full = shard.to_heads([query, key, value, g, beta], plan)

        def call(q: Any, k: Any, v: Any, g: Any, beta: Any, **documents: Any) -> torch.Tensor:
            return original(q, k, v, g=g, beta=beta, **documents, **kwargs)[0]

        return shard.to_sequence(shard.run_scan(original, call, full, "cu_seqlens"), plan), None

    return chunk_delta_rule


def mamba2_scan(original: Function, shard: ShardContext) -> Function:
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
        plan, mine = shard.plan_heads(hidden_states.shape[2], B.shape[2])
        kwargs = _without_documents(kwargs)
        kwargs |= {name: x[mine] for name, x in {"D": D, "dt_bias": dt_bias}.items() if x is not None}
        full = shard.to_heads([hidden_states, dt, B, C], plan)

        def call(x: Any, dt: Any, B: Any, C: Any, **documents: Any) -> torch.Tensor:
            return original(x, dt, A[mine], B, C, **documents, **kwargs)

        return shard.to_sequence(shard.run_scan(original, call, full, "seq_idx"), plan)

    return chunk_scan


def mamba_scan(original: Function, shard: ShardContext) -> Function:
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
        plan, mine = shard.plan_heads(hidden_states.shape[1], 1)
        kwargs |= {name: x[mine] for name, x in {"D": D, "delta_bias": delta_bias}.items() if x is not None}
        of_channels = [hidden_states, dt] if z is None else [hidden_states, dt, z]
        tensors = [*(x.transpose(1, 2) for x in of_channels), *(x.transpose(1, 2).unsqueeze(2) for x in (B, C))]
        full = shard.to_heads(tensors, plan)
        x, dt, *z_if_any = (w.transpose(1, 2) for w in full[:-2])
        B, C = (w.squeeze(2).transpose(1, 2) for w in full[-2:])
        out_BcS = original(x, dt, A[mine], B, C, z=z_if_any[0] if z_if_any else None, **kwargs)
        return shard.to_sequence(out_BcS.transpose(1, 2).unsqueeze(-1), plan).squeeze(-1).transpose(1, 2)

    return selective_scan


def disable_fused(original: Function, shard: ShardContext) -> Function:
    """Disable a fused projection, convolution, scan and norm: on None a layer calls its separate functions."""
    return lambda *args, **kwargs: None


SHARDED_FUNCTIONS = {
    "causal_conv1d_fn": convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": mamba2_scan,
    "mamba2_split_conv1d_scan_combined": disable_fused,
    "mamba_selective_scan": mamba_scan,
    "mamba_inner_fn": disable_fused,
}
"""Factories of sharded functions by the names in ``layers.TOKEN_MIXERS``."""


def _without_documents(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name not in _DOCUMENT_ARGUMENTS}


def _refuse_states(kwargs: dict[str, Any], **more: Any) -> None:
    """Raise on arguments of generation with a cache."""
    states = ("initial_state", "initial_states", "output_final_state", "return_final_states", "return_last_state")
    more |= {name: kwargs[name] for name in states if kwargs.get(name) not in (None, False)}
    given = [name for name, value in more.items() if value is not None]
    if given:
        raise UnsupportedModelError(f"a scan got {', '.join(given)}: not supported under sequence parallelism")


def _is_plain_torch(value: Any) -> bool:
    """Return True if transformers runs this function in plain torch, which does not separate documents."""
    if isinstance(value, torch.nn.Module) and "forward" in vars(value):
        return False  # replaced by a kernel from the hub
    return not inspect.getclosurevars(kernel_wrapper(value)).nonlocals["is_new_implementation"]


def shard_linear_layers(model: torch.nn.Module, group: Any, calls: ForwardContext, patches: PatchSet) -> None:
    """Shard a model's layers without attention over a group; none may be in ``unsupported_linear_layers``."""
    layers = list(linear_layers(model).values())
    shard, owned = ShardContext(group), weakref.WeakSet(layers)
    forwards = {each: _sharded_forward(each, shard, calls, owned) for each in {type(layer) for layer in layers}}
    for layer in layers:
        # As a method, a deep copy of the layer binds its own, which raises.
        patches.forward(layer, forwards[type(layer)])


def _sharded_forward(
    layer: type[torch.nn.Module], shard: ShardContext, calls: ForwardContext, owned: weakref.WeakSet[torch.nn.Module]
) -> Callable[..., Any]:
    original = inspect.unwrap(layer.forward)
    known = {name: function for name, function in mixing_functions(layer).items() if name in TOKEN_MIXERS}
    sharded = {name: SHARDED_FUNCTIONS[name](function, shard) for name, function in known.items()}
    # The layer's code looks the functions up in the globals of its source file.
    run = copy_function(original, lambda function: sharded if function is original else {})
    signature = inspect.signature(original)
    without_packing = [name for name in known if not TOKEN_MIXERS[name].supports_packing]

    # Collectives and checks stay out of compiled graphs, which would also read the source file's own globals.
    @torch.compiler.disable
    @functools.wraps(layer.forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if calls.whole:
            return layer.forward(self, *args, **kwargs)
        if self not in owned:
            raise UnsupportedModelError(
                f"{layer.__name__} is a copy of one in a model under sequence parallelism, and would mix the sequences "
                "of all ranks. Copy the model before deepspeed.initialize, or build it from copy.deepcopy(model.config)"
            )
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        calls.check_inside(layer.__name__)
        calls.linear += 1
        calls.with_documents += cu_seqlens is not None
        _check_arguments(layer.__name__, signature.bind(self, *args, **kwargs).arguments)
        if cu_seqlens is not None:
            _check_documents(layer.__name__, without_packing, kwargs)
        shard.cu_seqlens = cu_seqlens
        try:
            return run(self, *args, **kwargs)
        finally:
            shard.cu_seqlens = None

    return forward


def _check_arguments(layer: str, arguments: dict[str, Any]) -> None:
    if arguments.get("attention_mask") is not None:
        shape = list(arguments["attention_mask"].shape)
        raise UnsupportedModelError(f"{layer} got a mask of shape {shape}: not supported under sequence parallelism")
    caches = [name for name in CACHES if arguments.get(name, arguments.get("kwargs", {}).get(name)) is not None]
    if caches:
        raise UnsupportedModelError(
            f"{layer} got {caches[0]}: generation with a cache is not available under sequence parallelism"
        )


def _check_documents(layer: str, without_packing: list[str], kwargs: dict[str, Any]) -> None:
    """Raise on packed documents if transformers carries the state of one into the next."""
    if without_packing:
        raise UnsupportedModelError(
            f"packed documents would see one another in {layer}: transformers does not tell its {without_packing[0]} "
            "where they end. Give the model one document per row"
        )
    if kwargs.get("seq_idx") is None:
        raise UnsupportedModelError(
            f"packed documents without seq_idx: without sequence parallelism they would see one another in {layer}. "
            "Add it to the batch, [batch, sequence], the number of each token's document "
            "(DataCollatorWithFlattening(return_seq_idx=True)), or give the model one document per row"
        )

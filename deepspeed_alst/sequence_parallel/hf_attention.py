"""Ulysses attention in transformers' attention interface, under a name private to one model."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.offload.attention_cache import keeping_frame
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.head_plan import HeadPlan
from deepspeed_alst.sequence_parallel.hf_backends import AttentionBackend
from deepspeed_alst.sequence_parallel.hf_masks import mask_function_for
from deepspeed_alst.sequence_parallel.hf_positions import ScaleQueries, take_temperatures
from deepspeed_alst.sequence_parallel.mask_spec import MaskSpec
from deepspeed_alst.sequence_parallel.private_name import PrivateName
from deepspeed_alst.sequence_parallel.ulysses import ulysses_attention

# Arguments of an attention call that change its result. A core gets those in its forwarded_kwargs; any other raises.
_ARGUMENTS = (
    "sliding_window",
    "softcap",
    "s_aux",
    "deterministic",
    "kernel_options",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "position_bias",
    "head_mask",
    "block_table",
    "cache",
)
# Arguments that a mask expresses too; a mask overrides them, as in transformers.
_IN_THE_MASK = ("sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def register_attention(
    model: torch.nn.Module, core: AttentionBackend, group: Any, calls: ForwardContext, patches: PatchSet
) -> None:
    """Register Ulysses attention over ``group`` for one model and count its calls."""
    name = PrivateName(core.name)
    scale_queries = take_temperatures(model, dist.get_rank(group), calls, patches)
    layers = weakref.WeakSet(model.modules())
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    patches.entry(functions, name, _attention_over(group, core, calls, layers, scale_queries))
    # transformers silently builds no mask for a name that is missing from the mask interface.
    patches.entry(masks, name, mask_function_for(core, dist.get_world_size(group), calls))
    patches.set(model.config, "_attn_implementation", name)


def _attention_over(
    group: Any,
    core: AttentionBackend,
    calls: ForwardContext,
    layers: weakref.WeakSet[torch.nn.Module],
    scale_queries: ScaleQueries,
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the attention function: q ``[B, H, s, D]``, k and v ``[B, K, s, D]`` to ``[B, s, H, D]``."""
    attend = core.make(core)

    # Graph break: collectives, counters and checks stay out of compiled graphs.
    @torch.compiler.disable
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: MaskSpec | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        _check_caller(module, layers, calls)
        # position_ids are left out: they cover one shard, and documents come in cu_seq_lens_q or in the mask.
        beside = _IN_THE_MASK if core.uses_mask else ()
        arguments = {name: kwargs[name] for name in _ARGUMENTS if kwargs.get(name) is not None and name not in beside}
        arguments |= {"dropout": dropout} if dropout else {}
        _check_call(module, query, key, attention_mask, is_causal)
        _check_arguments(module, core, arguments)
        calls.attention += 1
        documents = arguments.get("cu_seq_lens_q") if attention_mask is None else attention_mask.documents
        calls.with_documents += documents is not None and len(documents) > 2
        if "s_aux" in arguments:
            arguments["s_aux"] = _of_this_rank(arguments["s_aux"], query, key, group)

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(module, q, k, v, attention_mask, scaling, arguments)

        frame = keeping_frame(core.name, core.runs_operators)
        return ulysses_attention(scale_queries(module, query), key, value, group, run, frame), None

    return attention


def _check_caller(module: torch.nn.Module, layers: weakref.WeakSet[torch.nn.Module], calls: ForwardContext) -> None:
    """Raise for a module of another model, and for a call outside of the model's forward."""
    if module not in layers:
        raise UnsupportedModelError(
            f"{type(module).__name__} is part of another model, built from the config of one under sequence "
            "parallelism: its attention would mix the sequences of all ranks. Build it from "
            "copy.deepcopy(model.config)"
        )
    # Recomputation in the backward runs layers outside of the model's forward.
    if not calls.inside and torch._C._current_graph_task_id() == -1:
        raise UnsupportedModelError(
            f"{type(module).__name__} was called outside of its causal language model: what reached it was not "
            "checked to be a shard. Call the engine, with a batch of the sharded loader."
        )


def _of_this_rank(per_head_H: torch.Tensor, query: torch.Tensor, key: torch.Tensor, group: Any) -> torch.Tensor:
    """Slice out the values of this rank's query heads: ``[H] -> [h]``."""
    plan = HeadPlan(dist.get_world_size(group), query.shape[1], key.shape[1])
    heads = plan.heads_of(dist.get_rank(group))
    return per_head_H[heads.start : heads.stop]


def _check_call(module, query, key, attention_mask, is_causal) -> None:
    """Raise on a per-shard mask, a cache or non-causal attention, which the config does not show."""
    layer = type(module).__name__
    if attention_mask is not None and not isinstance(attention_mask, MaskSpec):
        raise UnsupportedModelError(
            f"{layer} was given a mask of its own making ({type(attention_mask).__name__}"
            f" {list(getattr(attention_mask, 'shape', ()))}): it is a shard's"
        )
    if query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"{layer} has {query.shape[2]} queries for {key.shape[2]} keys: generation with a cache, and attention to "
            "other sequences, are not yet available under sequence parallelism"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError(f"{layer}: attention that is not causal is not verified")


def _check_arguments(module: torch.nn.Module, core: AttentionBackend, arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name not in core.forwarded_kwargs:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called with {name}, which attn_implementation='{core.name}' is not given "
                "under sequence parallelism; of all cores flash attention is given most "
                "(attn_implementation='flash_attention_2')"
            )

"""Ulysses attention in transformers' attention interface, under a name private to one model."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.head_plan import HeadPlan
from deepspeed_alst.sequence_parallel.hf_backends import AttentionBackend
from deepspeed_alst.sequence_parallel.hf_masks import mask_function_for
from deepspeed_alst.sequence_parallel.hf_positions import ScaleQueries, take_temperatures
from deepspeed_alst.sequence_parallel.mask_spec import MaskSpec
from deepspeed_alst.sequence_parallel.private_config import PrivateName
from deepspeed_alst.sequence_parallel.ulysses import ulysses_attention

# Arguments that a mask expresses too; a mask overrides them, as in transformers.
_IN_THE_MASK = ("sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Arguments of an attention call that change its result. A backend gets its forwarded_kwargs; any other raises.
_ARGUMENTS = (
    *_IN_THE_MASK,
    *("softcap", "s_aux", "deterministic", "kernel_options", "position_bias", "head_mask", "block_table", "cache"),
)


def register_attention(
    model: torch.nn.Module, backend: AttentionBackend, group: Any, calls: ForwardContext, patches: PatchSet
) -> None:
    """Register Ulysses attention over ``group`` for one model and count its calls."""
    name = PrivateName(backend.name)
    scale_queries = take_temperatures(model, dist.get_rank(group), calls, patches)
    layers = weakref.WeakSet(model.modules())
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    patches.entry(functions, name, _attention_over(group, backend, calls, layers, scale_queries))
    # transformers silently builds no mask for a name that is missing from the mask interface.
    patches.entry(masks, name, mask_function_for(backend, dist.get_world_size(group), calls))
    patches.set(model.config, "_attn_implementation", name)


def _attention_over(
    group: Any,
    backend: AttentionBackend,
    calls: ForwardContext,
    layers: weakref.WeakSet[torch.nn.Module],
    scale_queries: ScaleQueries,
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the attention function: q ``[B, H, s, D]``, k and v ``[B, K, s, D]`` to ``[B, s, H, D]``."""

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
        # position_ids are left out: they cover one shard, and documents come in cu_seq_lens_q or in the mask.
        beside = _IN_THE_MASK if backend.uses_mask else ()
        arguments = {name: kwargs[name] for name in _ARGUMENTS if kwargs.get(name) is not None and name not in beside}
        arguments |= {"dropout": dropout} if dropout else {}
        _check_call(module, query, key, attention_mask, is_causal, layers)
        calls.check_inside(type(module).__name__)
        for name in arguments.keys() - set(backend.forwarded_kwargs):
            raise UnsupportedModelError(
                f"{type(module).__name__} was called with {name}, which attn_implementation='{backend.name}' is not "
                "given under sequence parallelism; of all backends flash attention is given most "
                "(attn_implementation='flash_attention_2')"
            )
        calls.attention += 1
        documents = arguments.get("cu_seq_lens_q") if attention_mask is None else attention_mask.documents
        calls.with_documents += documents is not None and len(documents) > 2
        if "s_aux" in arguments:
            plan = HeadPlan(dist.get_world_size(group), query.shape[1], key.shape[1])
            heads = plan.heads_of(dist.get_rank(group))
            arguments["s_aux"] = arguments["s_aux"][heads.start : heads.stop]

        def run(*qkv: torch.Tensor) -> torch.Tensor:
            return backend.attend(module, qkv, attention_mask, scaling, arguments)

        frame = calls.keeping_frame and calls.keeping_frame(backend.name, backend.runs_operators)
        return ulysses_attention(scale_queries(module, query), key, value, group, run, frame), None

    return attention


def _check_call(module, query, key, attention_mask, is_causal, layers) -> None:
    """Raise for a module of another model, a per-shard mask, a cache, or attention that is not causal."""
    layer = type(module).__name__
    if module not in layers:
        raise UnsupportedModelError(
            f"{layer} is part of another model, built from the config of one under sequence parallelism: its attention "
            "would mix the sequences of all ranks. Build it from copy.deepcopy(model.config)"
        )
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

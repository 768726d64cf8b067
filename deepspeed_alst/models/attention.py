"""Ulysses attention in transformers' attention interface, under a name that one model alone uses."""

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch._guards import active_fake_mode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from deepspeed_alst.attention.heads import HeadPlan
from deepspeed_alst.attention.kept import keeping_frame
from deepspeed_alst.attention.ulysses import ulysses_attention
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.models.calls import Calls
from deepspeed_alst.models.cores import Core
from deepspeed_alst.models.names import PrivateName

# Arguments of an attention call that change its result. A core is given those that it passes on; any other is refused.
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

_PACKED = "and_masks.<locals>.and_mask"


def register_attention(model: torch.nn.Module, core: Core, group: Any, calls: Calls, undo: ExitStack) -> None:
    """Have a model call Ulysses attention over ``group``, whose calls are counted; ``undo.close()`` takes it back."""
    name = PrivateName(core.name)
    AttentionInterface.register(name, _attention_over(group, core, calls, weakref.WeakSet(model.modules())))
    undo.callback(AttentionInterface._global_mapping.pop, name, None)
    # A name that is missing from the mask interface means "no mask" to transformers, silently.
    AttentionMaskInterface.register(name, _no_mask if core.has_windows else _only_plain_causal)
    undo.callback(AttentionMaskInterface._global_mapping.pop, name, None)
    config, before = model.config, model.config._attn_implementation
    config._attn_implementation = name
    undo.callback(setattr, config, "_attn_implementation", before)


def _attention_over(
    group: Any, core: Core, calls: Calls, layers: weakref.WeakSet[torch.nn.Module]
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Transformers' attention function: q ``[B, H, s, D]``, k and v ``[B, K, s, D]`` to ``[B, s, H, D]``."""
    attend = core.make(core)

    # A compiled layer is two graphs, before and after: collectives, counts and checks stay out of them.
    @torch.compiler.disable
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if module not in layers:
            raise UnsupportedModelError(
                f"{type(module).__name__} is part of another model, built from the config of one under sequence "
                "parallelism: its attention would mix the sequences of all ranks. Build it from "
                "copy.deepcopy(model.config)"
            )
        # A recomputation in the backward runs layers by themselves.
        if not calls.inside and torch._C._current_graph_task_id() == -1:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called outside of its causal language model: what reached it was not "
                "checked to be a shard. Call the engine, with a batch of the sharded loader."
            )
        # Not among them are position_ids: they are a shard's, and documents come in cu_seq_lens_q.
        arguments = {name: kwargs[name] for name in _ARGUMENTS if kwargs.get(name) is not None}
        calls.attention += 1
        calls.with_documents += "cu_seq_lens_q" in arguments
        _check_call(module, query, key, attention_mask, dropout, is_causal)
        _check_arguments(module, core, arguments)
        if "s_aux" in arguments:
            arguments["s_aux"] = _of_this_rank(arguments["s_aux"], query, key, group)

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attend(module, q, k, v, scaling, arguments)

        frame = keeping_frame(core.name, core.runs_operators)
        return ulysses_attention(query, key, value, group, run, frame), None

    return attention


def _of_this_rank(per_head_H: torch.Tensor, query: torch.Tensor, key: torch.Tensor, group: Any) -> torch.Tensor:
    """What belongs to this rank's query heads: ``[H] -> [h]``."""
    plan = HeadPlan(dist.get_world_size(group), query.shape[1], key.shape[1])
    heads = plan.heads_of(dist.get_rank(group))
    return per_head_H[heads.start : heads.stop]


def _check_call(module, query, key, attention_mask, dropout, is_causal) -> None:
    """The second net: what the config did not show and the call does."""
    layer = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModelError(f"{layer} was given a mask of shape {list(attention_mask.shape)}: not verified")
    if query.shape[2] != key.shape[2]:
        raise UnsupportedModelError(
            f"{layer} has {query.shape[2]} queries for {key.shape[2]} keys: generation with a cache, and attention to "
            "other sequences, are not yet available under sequence parallelism"
        )
    if dropout:
        raise UnsupportedModelError(f"{layer}: attention dropout {dropout} is not available; set it to 0")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedModelError(f"{layer}: attention that is not causal is not verified")


def _check_arguments(module: torch.nn.Module, core: Core, arguments: dict[str, Any]) -> None:
    for name in arguments:
        if name not in core.passes_on:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called with {name}, which attn_implementation='{core.name}' is not given "
                "under sequence parallelism; of all cores flash attention is given most "
                "(attn_implementation='flash_attention_2')"
            )


def _no_mask(*, attention_mask: Any = None, **kwargs: Any) -> None:
    """Transformers' mask function of flash attention where nothing is padded: windows and documents are arguments."""
    _check_no_padding_mask(attention_mask)


def _only_plain_causal(
    *, mask_function: Callable[..., Any], attention_mask: Any = None, use_vmap: bool = False, **kwargs: Any
) -> None:
    """Transformers' mask function: no mask, after making sure that causal is all that is asked for."""
    # In a compiled model and of fake tensors transformers cannot read position_ids, and always asks for the mask of
    # packed samples. That they are not packed is the batch guard's to see; masks of a model's own have use_vmap.
    cannot_read = torch.compiler.is_compiling() or active_fake_mode() is not None
    unread = cannot_read and mask_function.__qualname__ == _PACKED and not use_vmap
    if mask_function is not causal_mask_function and not unread:
        raise UnsupportedModelError(
            f"the model asks for a mask other than plain causal ({mask_function.__qualname__}): under sequence "
            "parallelism only flash attention has windows and packed samples (attn_implementation='flash_attention_2')"
        )
    _check_no_padding_mask(attention_mask)


def _check_no_padding_mask(attention_mask: Any) -> None:
    if attention_mask is not None:
        raise UnsupportedModelError(
            "attention_mask reached the model: the sharded loader checks and drops it; remove it from the batch"
        )

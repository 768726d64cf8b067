"""Ulysses attention in transformers' attention interface, and the backends that run between its all-to-alls.

sdpa is called directly, in blocks under a mask (blocked_sdpa.py), all other backends by transformers' functions.

Legend: B batch, S full sequence, s = S/P, D head dim; H and K query and KV heads, h and k those of this rank.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flex_attention_mask

from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.hf_masks import MaskSpec, mask_function_for
from deepspeed_alst.attention.private_config import PrivateName, under_own_name
from deepspeed_alst.attention.ulysses import ulysses_attention
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import counted_attention, heads_from

TRIAL = "alst_trial"
"""Attention with a full score matrix, to probe a model on CPU for which transformers has no sdpa."""
_LARGEST_MASK = 2**30
IN_THE_MASK = ("sliding_window", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments that a mask expresses too; a mask overrides them, as in transformers."""
# Arguments of an attention call that change its result. A backend gets its forwarded_kwargs; any other raises.
_ARGUMENTS = (
    *IN_THE_MASK,
    *("softcap", "s_aux", "deterministic", "kernel_options", "position_bias", "head_mask", "block_table", "cache"),
)
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class AttentionBackend:
    """One attention implementation, under its transformers name."""

    name: str
    forwarded_kwargs: tuple[str, ...]
    """Result-changing arguments of the attention call that this backend gets."""
    attend: Callable[..., torch.Tensor]
    """``(module, (q, k, v), mask, scaling, kwargs)``: ``[B, h, S, D], 2 x [B, k, S, D] -> [B, h, S, D]``."""
    uses_mask: bool = True
    """True if windows, chunks and packed documents reach the backend as a mask, not as arguments."""
    runs_operators: bool = True
    """True if it runs as torch operators, not as a compiled graph."""
    is_programs_own: bool = False
    """True if it is a function of the program, whose result is not known to be softmax attention."""


def find_backend(name: str) -> AttentionBackend | None:
    """Return the backend of an ``attn_implementation``; None if unavailable under sequence parallelism.

    Flash attention has many names (2, 3, 4, kernels of the hub), so its function identifies it. A user function under
    "sdpa" runs on the full sequence of this rank's heads; one under another of these names is not available.
    """
    function = AttentionInterface._global_mapping.get(name)
    if name == "sdpa" and function is sdpa_attention_forward:
        return AttentionBackend(name, ("dropout",), _sdpa)
    if name == "sdpa":
        function = functools.partial(_user_function, function)
        return AttentionBackend(name, (), function, runs_operators=False, is_programs_own=True)
    if name == TRIAL:
        return AttentionBackend(name, ("softcap", "s_aux"), _trial)
    if function is flash_attention_forward:
        arguments = ("dropout", "softcap", "s_aux", "deterministic", *IN_THE_MASK)
        return AttentionBackend(name, arguments, functools.partial(_flash, name), uses_mask=False)
    if function is flex_attention_forward:
        return AttentionBackend(name, ("softcap", "kernel_options"), _flex, runs_operators=False)
    return None


def _sdpa(module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: Any) -> torch.Tensor:
    dropout = kwargs.get("dropout", 0.0)
    if mask is None:
        return causal_sdpa(*qkv, scaling, dropout)
    from deepspeed_alst.attention.blocked_sdpa import attend

    return attend(*qkv, mask, scaling, dropout)


def causal_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, dropout: float) -> Any:
    """Attend causally by torch's sdpa: ``[B, h, S, D], 2 x [B, k, S, D] -> [B, h, S, D]``."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scaling, enable_gqa=gqa)


def _trial(module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: Any) -> torch.Tensor:
    from deepspeed_alst.attention.blocked_sdpa import attend_all_pairs

    return attend_all_pairs(*qkv, mask, scaling, **kwargs)


def _user_function(
    function: Callable[..., Any],
    module: Any,
    qkv: Tensors,
    mask: MaskSpec | None,
    scaling: float | None,
    kwargs: Any,
) -> torch.Tensor:
    """Call a user function registered as sdpa, with a mask as transformers makes it: ``[1, 1, S, S]``."""
    length, dense = qkv[0].shape[2], None
    if mask is not None and length**2 > _LARGEST_MASK:
        raise UnsupportedModelError(
            f"the program's own function under attn_implementation='sdpa' needs a mask of {length} x {length} tokens "
            f"for this window, these chunks or packed documents, more than {_LARGEST_MASK} bytes. Leave transformers' "
            "function there, or give it shorter sequences"
        )
    if mask is not None:
        dense = mask.seen(length, qkv[0].device)[None, None]
    # This rank's groups, which may be smaller than the model's.
    seen = under_own_name(module, "sdpa", num_key_value_groups=qkv[0].shape[1] // qkv[1].shape[1])
    out_BShD, _ = function(seen, *qkv, dense, dropout=0.0, scaling=scaling, **kwargs)
    return out_BShD.transpose(1, 2)


def _flash(
    name: str, module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: Any
) -> torch.Tensor:
    seen = under_own_name(module, name)
    with counted_attention(qkv[0].device) if "dropout" in kwargs else contextlib.nullcontext():
        out_BShD, _ = flash_attention_forward(seen, *qkv, None, scaling=scaling, is_causal=True, **kwargs)
    return out_BShD.transpose(1, 2)


def _flex(module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: Any) -> torch.Tensor:
    q = qkv[0]
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        raise UnsupportedModelError(
            "attn_implementation='flex_attention' cannot train on CPU: PyTorch has no backward of it there. Load "
            "the model with attn_implementation='sdpa'"
        )
    blocks = _block_mask(mask, q.shape[2], q.device)
    out_BShD, _ = flex_attention_forward(module, *qkv, blocks, scaling=scaling, **kwargs)
    return out_BShD.transpose(1, 2)


# A million tokens make a mask of 2**26 blocks; two are cached, as layers with and without a window alternate.
@functools.lru_cache(maxsize=2)
def _block_mask(mask: MaskSpec | None, length: int, device: torch.device) -> Any:
    """Build flex attention's block mask of the full sequence; one row, broadcast over the batch."""
    rule = causal_mask_function if mask is None else mask.rule(length, device)
    return flex_attention_mask(1, length, length, mask_function=rule, device=device)


def read_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """Return q, k, v, mask, scaling and the arguments that change the result of a call of transformers' attention."""
    arguments = {name: kwargs[name] for name in _ARGUMENTS if kwargs.get(name) is not None}
    arguments |= {"dropout": dropout} if dropout else {}
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        arguments["is_causal"] = False
    return query, key, value, attention_mask, scaling, arguments


def register_attention(
    model: torch.nn.Module, backend: AttentionBackend, group: Any, calls: ForwardContext, patches: PatchSet
) -> None:
    """Register Ulysses attention over ``group`` for one model and count its calls."""
    name, layers = PrivateName(backend.name), weakref.WeakSet(model.modules())
    functions, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
    patches.entry(functions, name, _attention_over(group, backend, calls, layers))
    # transformers silently builds no mask for a name that is missing from the mask interface.
    patches.entry(masks, name, mask_function_for(backend, dist.get_world_size(group), calls))
    patches.set(model.config, "_attn_implementation", name)


def _attention_over(
    group: Any, backend: AttentionBackend, calls: ForwardContext, layers: weakref.WeakSet[torch.nn.Module]
) -> Callable[..., tuple[torch.Tensor, None]]:
    """Return the attention function: q ``[B, H, s, D]``, k and v ``[B, K, s, D]`` to ``[B, s, H, D]``."""

    # Graph break: collectives, counters and checks stay out of compiled graphs.
    @torch.compiler.disable
    def attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        query, key, value, attention_mask, scaling, arguments = read_call(module, *args, **kwargs)
        # position_ids are left out: they cover one shard, and documents come in cu_seq_lens_q or in the mask.
        of_mask = ("is_causal",) if hasattr(attention_mask, "images") else ()  # such a mask says what is causal
        ignored = (*IN_THE_MASK, *of_mask) if backend.uses_mask else ()
        arguments = {name: value for name, value in arguments.items() if name not in ignored}
        _check_call(module, query, key, attention_mask, arguments.get("is_causal", True), layers)
        calls.check_inside(type(module).__name__)
        for name in arguments.keys() - set(backend.forwarded_kwargs):
            raise UnsupportedModelError(
                f"{type(module).__name__} was called with {name}, which attn_implementation='{backend.name}' does not "
                "support under sequence parallelism; attn_implementation='flash_attention_2' supports most arguments"
            )
        calls.attention += 1
        documents = arguments.get("cu_seq_lens_q") if attention_mask is None else attention_mask.documents
        calls.with_documents += documents is not None and len(documents) > 2
        if calls.answer_attention is not None:
            return calls.answer_attention(query, key, value, attention_mask, scaling, arguments, backend), None
        exchange, rank = _plan(group, calls, query.shape[1], key.shape[1]), dist.get_rank(group)
        plan = exchange[0]
        heads = plan.heads_of(rank)
        if "s_aux" in arguments:
            arguments["s_aux"] = arguments["s_aux"][heads.start : heads.stop]
        if calls.scale_queries is not None:
            query = calls.scale_queries(module, query)

        def run(*qkv: torch.Tensor) -> torch.Tensor:
            with contextlib.nullcontext() if plan.is_even else heads_from(heads.start):
                return backend.attend(module, qkv, attention_mask, scaling, arguments)

        runs_operators = plan.row_groups > 1 or backend.runs_operators
        frame = calls.saving_frame and calls.saving_frame(backend.name, runs_operators)
        if plan.row_groups == 1:
            return ulysses_attention(query, key, value, group, run, frame, *exchange), None
        from deepspeed_alst.attention.row_attention import attend_rows

        call = module, heads, list(plan.rows(rank, query.shape[2])), attention_mask, scaling, arguments, backend, frame
        attend = functools.partial(attend_rows, *call)
        return ulysses_attention(query, key, value, group, attend, None, *exchange), None

    return attention


def _plan(group: Any, calls: ForwardContext, *heads: int) -> tuple[HeadPlan, Any]:
    """Return the split of a layer's heads, and the group in which this rank gathers K and V."""
    plan = HeadPlan(dist.get_world_size(group), *heads, node_size=calls.node_size)
    if plan.kv_parts > 1 and plan.kv_parts not in calls.kv_groups:  # its heads are not the config's
        plan = dataclasses.replace(plan, node_size=0)
    return plan, calls.kv_groups.get(plan.kv_parts)


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
            "other sequences, are not available under sequence parallelism"
        )
    if not is_causal:
        raise UnsupportedModelError(f"{layer}: attention that is not causal is not verified")

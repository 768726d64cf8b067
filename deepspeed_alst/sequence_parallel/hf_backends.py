"""Attention backends: the attention between the two all-to-alls, and the call arguments that each gets.

sdpa is called directly, block by block if a mask applies (blocked_sdpa.py). For every other backend transformers' own
function is called, with the full sequence and this rank's heads, so that its special cases (casts, windows, varlen,
kernels from the hub) stay transformers'. Windows and documents reach flash attention as arguments, sdpa and flex as a
mask.

Legend: B batch, S full sequence, D head dim; h and k are the query and KV heads of this rank.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, flex_attention_mask

from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws.draw_mode import counted_attention
from deepspeed_alst.sequence_parallel.blocked_sdpa import attend as attend_by_sdpa
from deepspeed_alst.sequence_parallel.mask_spec import MaskSpec

TRIAL = "alst_trial"
"""Plain attention with soft-cap and sinks, to probe a model on CPU for which transformers has no sdpa."""
_LARGEST_MASK = 2**30
_FLASH_KWARGS = (
    *("dropout", "sliding_window", "softcap", "s_aux", "deterministic"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class AttentionBackend:
    """One attention implementation, under its transformers name."""

    name: str
    forwarded_kwargs: tuple[str, ...]
    """Result-changing arguments of the attention call that this backend gets."""
    run: Callable[..., torch.Tensor]
    uses_mask: bool = True
    """True if windows, chunks and packed documents reach the backend as a mask, not as arguments."""
    runs_operators: bool = False
    """True if it runs as torch operators, not as a compiled graph."""

    def attend(
        self, module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Attend over the full sequence: ``[B, h, S, D], 2 x [B, k, S, D] -> [B, h, S, D]``."""
        return self.run(self.name, module, qkv, mask, scaling, kwargs)

    @property
    def keeps_documents_apart(self) -> bool:
        """True if packed documents do not attend to one another."""
        return self.uses_mask or "cu_seq_lens_q" in self.forwarded_kwargs


def find_backend(name: str) -> AttentionBackend | None:
    """Return the backend of an ``attn_implementation``; None if unavailable under sequence parallelism.

    Flash attention has many names (2, 3, 4, kernels of the hub), so its function identifies it. A user function under
    one of these names is not available; one under "sdpa" is, and runs on the full sequence of this rank's heads.
    """
    function = AttentionInterface._global_mapping.get(name)
    if name == "sdpa":
        if function is sdpa_attention_forward:
            return AttentionBackend(name, ("dropout",), _sdpa, runs_operators=True)
        return AttentionBackend(name, (), functools.partial(_programs, function))
    if name == TRIAL:
        return AttentionBackend(name, ("softcap", "s_aux"), _plain, runs_operators=True)
    if function is flash_attention_forward:
        return AttentionBackend(name, _FLASH_KWARGS, _flash, uses_mask=False, runs_operators=True)
    if function is flex_attention_forward:
        return AttentionBackend(name, ("softcap", "kernel_options"), _flex)
    return None


def keeps_documents_apart(model: Any) -> bool:
    """Return True if a model's packed documents do not attend to one another under sequence parallelism."""
    backend = find_backend(model.config._attn_implementation)
    return backend is not None and backend.keeps_documents_apart


def starts_at_lowest(model: Any) -> bool:
    """Return True if packed documents start at the lowest position id, as in flash attention."""
    backend = find_backend(model.config._attn_implementation)
    return backend is not None and not backend.uses_mask


def _sdpa(
    name: str, module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    return attend_by_sdpa(*qkv, mask, scaling, kwargs.get("dropout", 0.0))


def _programs(
    function: Callable[..., Any],
    name: str,
    module: Any,
    qkv: Tensors,
    mask: MaskSpec | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Run a user function registered as sdpa; it gets a mask of the same form."""
    q = qkv[0]
    dense = None if mask is None else _dense(mask, q.shape[2], q.device)
    out_BShD, _ = function(under_own_name(module, name), *qkv, dense, dropout=0.0, scaling=scaling, **kwargs)
    return out_BShD.transpose(1, 2)


def _dense(mask: MaskSpec, length: int, device: torch.device) -> torch.Tensor:
    """Build the ``[1, 1, S, S]`` mask as transformers does for sdpa: True where a token attends to another."""
    if length**2 > _LARGEST_MASK:
        raise UnsupportedModelError(
            f"the program's own function under attn_implementation='sdpa' needs a mask of {length} x {length} tokens "
            f"for this window, these chunks or packed documents, more than {_LARGEST_MASK} bytes. Leave transformers' "
            "function there, or give it shorter sequences"
        )
    return mask.seen(length, device)[None, None]


def _plain(
    name: str, module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Attend with the full score matrix: for trials of about a hundred tokens, on any device."""
    (q, *kv), softcap, sinks_h = qkv, kwargs.get("softcap"), kwargs.get("s_aux")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in kv)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~(mask or MaskSpec()).seen(q.shape[2], q.device), -torch.inf)
    if sinks_h is not None:  # they take part in the softmax, without a value
        sinks = sinks_h.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    return scores.float().softmax(-1).to(v.dtype)[..., : k.shape[2]] @ v


def _flash(
    name: str, module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: dict[str, Any]
) -> torch.Tensor:
    seen = under_own_name(module, name)
    with counted_attention(qkv[0].device) if "dropout" in kwargs else contextlib.nullcontext():
        out_BShD, _ = flash_attention_forward(seen, *qkv, None, scaling=scaling, is_causal=True, **kwargs)
    return out_BShD.transpose(1, 2)


def _flex(
    name: str, module: Any, qkv: Tensors, mask: MaskSpec | None, scaling: float | None, kwargs: dict[str, Any]
) -> torch.Tensor:
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
    """Build the block mask of the full sequence, not the shard; one row, which flex broadcasts over the batch."""
    rule = causal_mask_function if mask is None else mask.rule(length, device)
    return flex_attention_mask(1, length, length, mask_function=rule, device=device)


def under_own_name(module: torch.nn.Module, name: str) -> Any:
    """Return a view of an attention module whose config has the backend's transformers name.

    With the private name transformers would load the kernel again and register it over the model's own entry.
    """
    return _Seen(module, config=_Seen(module.config, _attn_implementation=name))


class _Seen:
    """View of an object with some attributes replaced."""

    def __init__(self, seen: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)

"""Attention cores: the attention between the two all-to-alls, and the call arguments that each core gets.

sdpa is called directly, block by block if a mask applies (banded.py). For every other core transformers' own function
is called, with the full sequence and this rank's heads, so that its special cases (casts, windows, varlen, kernels from
the hub) stay transformers'. Windows and documents reach flash attention as arguments, sdpa and flex as a mask.

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
from deepspeed_alst.sequence_parallel.reference_attention import attend_plainly

TRIAL = "alst_trial"
"""Plain attention with soft-cap and sinks, to probe a model on CPU for which transformers has no sdpa."""
_LARGEST_MASK = 2**30
Attend = Callable[..., torch.Tensor]
"""``(module, q_BhSD, k_BkSD, v_BkSD, mask, scaling, arguments) -> out_BhSD``."""


@dataclass(frozen=True)
class AttentionBackend:
    """One attention implementation, under its transformers name."""

    name: str
    forwarded_kwargs: tuple[str, ...]
    """Result-changing arguments of the attention call that this core gets."""
    make: Callable[["AttentionBackend"], Attend]
    """Factory of one model's attention function."""

    @property
    def runs_operators(self) -> bool:
        """True if it runs as torch operators, not as a compiled graph."""
        return self.make in (_sdpa, _plain, _flash)

    @property
    def uses_mask(self) -> bool:
        """True if windows, chunks and packed documents reach the core as a mask, not as arguments."""
        return self.make is not _flash

    @property
    def keeps_documents_apart(self) -> bool:
        """True if packed documents do not attend to one another."""
        return self.uses_mask or "cu_seq_lens_q" in self.forwarded_kwargs


def find_backend(name: str) -> AttentionBackend | None:
    """Return the core of an ``attn_implementation``; None if unavailable under sequence parallelism.

    Flash attention has many names (2, 3, 4, kernels of the hub), so its function identifies it. A user function under
    one of these names is not available; one under "sdpa" is, and runs on the full sequence of this rank's heads.
    """
    function = AttentionInterface._global_mapping.get(name)
    if name == "sdpa":
        if function is sdpa_attention_forward:
            return AttentionBackend(name, ("dropout",), _sdpa)
        return AttentionBackend(name, (), functools.partial(_programs, function))
    if name == TRIAL:
        return AttentionBackend(name, ("softcap", "s_aux"), _plain)
    if function is flash_attention_forward:
        return AttentionBackend(name, _FLASH_ARGUMENTS, _flash)
    if function is flex_attention_forward:
        return AttentionBackend(name, ("softcap", "kernel_options"), _flex)
    return None


def keeps_documents_apart(model: Any) -> bool:
    """Return True if a model's packed documents do not attend to one another under sequence parallelism."""
    core = find_backend(model.config._attn_implementation)
    return core is not None and core.keeps_documents_apart


def starts_at_lowest(model: Any) -> bool:
    """Return True if packed documents start at the lowest position id, as in flash attention."""
    core = find_backend(model.config._attn_implementation)
    return core is not None and not core.uses_mask


_FLASH_ARGUMENTS = (
    "dropout",
    "sliding_window",
    "softcap",
    "s_aux",
    "deterministic",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)


def _sdpa(core: AttentionBackend) -> Attend:
    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: MaskSpec | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        return attend_by_sdpa(q, k, v, mask, scaling, arguments.get("dropout", 0.0))

    return attend


def _programs(function: Callable[..., Any], core: AttentionBackend) -> Attend:
    """Wrap a user function registered as sdpa; it gets a mask of the same form."""

    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: MaskSpec | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        dense = None if mask is None else _dense(mask, q.shape[2], q.device)
        seen = under_own_name(module, core.name)
        out_BShD, _ = function(seen, q, k, v, dense, dropout=0.0, scaling=scaling, **arguments)
        return out_BShD.transpose(1, 2)

    return attend


def _dense(mask: MaskSpec, length: int, device: torch.device) -> torch.Tensor:
    """Build the ``[1, 1, S, S]`` mask as transformers does for sdpa: True where a token attends to another."""
    if length**2 > _LARGEST_MASK:
        raise UnsupportedModelError(
            f"the program's own function under attn_implementation='sdpa' needs a mask of {length} x {length} tokens "
            f"for this window, these chunks or packed documents, more than {_LARGEST_MASK} bytes. Leave transformers' "
            "function there, or give it shorter sequences"
        )
    places = torch.arange(length, device=device)
    return mask.rule(length, device)(0, 0, places[:, None], places[None])[None, None]


def _plain(core: AttentionBackend) -> Attend:
    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: MaskSpec | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        return attend_plainly(q, k, v, mask, scaling, arguments.get("softcap"), arguments.get("s_aux"))

    return attend


def _flash(core: AttentionBackend) -> Attend:
    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: MaskSpec | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        plain = under_own_name(module, core.name)
        with counted_attention(q.device) if "dropout" in arguments else contextlib.nullcontext():
            out_BShD, _ = flash_attention_forward(plain, q, k, v, None, scaling=scaling, is_causal=True, **arguments)
        return out_BShD.transpose(1, 2)

    return attend


def _flex(core: AttentionBackend) -> Attend:
    # A million tokens make a mask of 2**26 blocks; two are cached, as layers with and without a window alternate.
    block_mask = functools.lru_cache(maxsize=2)(_block_mask)

    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: MaskSpec | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
            raise UnsupportedModelError(
                "attn_implementation='flex_attention' cannot train on CPU: PyTorch has no backward of it there. Load "
                "the model with attn_implementation='sdpa'"
            )
        blocks = block_mask(mask, q.shape[2], q.device)
        out_BShD, _ = flex_attention_forward(module, q, k, v, blocks, scaling=scaling, **arguments)
        return out_BShD.transpose(1, 2)

    return attend


def _block_mask(mask: MaskSpec | None, length: int, device: torch.device) -> Any:
    """Build the block mask of the full sequence, not the shard; one row, which flex broadcasts over the batch."""
    rule = causal_mask_function if mask is None else mask.rule(length, device)
    return flex_attention_mask(1, length, length, mask_function=rule, device=device)


def under_own_name(module: torch.nn.Module, name: str) -> Any:
    """Return a view of an attention module whose config has the core's transformers name.

    With the private name transformers would load the kernel again and register it over the model's own entry.
    """
    return _Seen(module, config=_Seen(module.config, _attn_implementation=name))


class _Seen:
    """View of an object with some attributes replaced."""

    def __init__(self, seen: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)

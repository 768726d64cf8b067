"""The attention cores: what attends between the two all-to-alls, and which arguments of the call it is given.

sdpa is called directly, piece by piece where a mask hides something (banded.py). Of every other core transformers' own
function is called, with the whole sequence and this rank's heads, so that its special cases (casts, windows, varlen,
kernels from the hub) stay transformers'. Windows and documents reach flash attention as arguments, sdpa and flex
attention in a mask.

Legend: B batch, S whole sequence, D head dim; h and k are the query and key/value heads of this rank.
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

from deepspeed_alst.attention.banded import attend as attend_by_sdpa
from deepspeed_alst.attention.plain import attend_plainly
from deepspeed_alst.attention.whole_mask import WholeMask
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.parallel.draw_mode import counted_attention

TRIAL = "alst_trial"
"""Plain attention with soft-cap and sinks, for a trial on CPU of a model for which transformers has no sdpa."""
_LARGEST_MASK = 2**30
Attend = Callable[..., torch.Tensor]
"""``(module, q_BhSD, k_BkSD, v_BkSD, mask, scaling, arguments) -> out_BhSD``."""


@dataclass(frozen=True)
class Core:
    """One way to attend, under the name that transformers has for it."""

    name: str
    passes_on: tuple[str, ...]
    """Arguments of the attention call that change its result and that this core is given."""
    make: Callable[["Core"], Attend]
    """Makes the function of one model."""

    @property
    def runs_operators(self) -> bool:
        """Whether it runs as operators of torch, and not as a graph of its own."""
        return self.make in (_sdpa, _plain, _flash)

    @property
    def takes_masks(self) -> bool:
        """Whether windows, chunks and packed documents reach the core in a mask; else as arguments."""
        return self.make is not _flash

    @property
    def keeps_documents_apart(self) -> bool:
        """Whether packed documents do not see one another."""
        return self.takes_masks or "cu_seq_lens_q" in self.passes_on


def find_core(name: str) -> Core | None:
    """The core behind an ``attn_implementation``; None if it is not available under sequence parallelism.

    Flash attention has many names (2, 3, 4, kernels of the hub): it is known by its function. A function that somebody
    else registered under one of the names is not known; one under "sdpa" attends, to whole sequences of its heads.
    """
    function = AttentionInterface._global_mapping.get(name)
    if name == "sdpa":
        if function is sdpa_attention_forward:
            return Core(name, ("dropout",), _sdpa)
        return Core(name, (), functools.partial(_programs, function))
    if name == TRIAL:
        return Core(name, ("softcap", "s_aux"), _plain)
    if function is flash_attention_forward:
        return Core(name, _FLASH_ARGUMENTS, _flash)
    if function is flex_attention_forward:
        return Core(name, ("softcap", "kernel_options"), _flex)
    return None


def keeps_documents_apart(model: Any) -> bool:
    """Whether packed documents do not see one another in a model's attention under sequence parallelism."""
    core = find_core(model.config._attn_implementation)
    return core is not None and core.keeps_documents_apart


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


def _sdpa(core: Core) -> Attend:
    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: WholeMask | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        return attend_by_sdpa(q, k, v, mask, scaling, arguments.get("dropout", 0.0))

    return attend


def _programs(function: Callable[..., Any], core: Core) -> Attend:
    """A program's own function in the place of transformers' sdpa, with a mask of the same form."""

    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: WholeMask | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        dense = None if mask is None else _dense(mask, q.shape[2], q.device)
        seen = under_own_name(module, core.name)
        out_BShD, _ = function(seen, q, k, v, dense, dropout=0.0, scaling=scaling, **arguments)
        return out_BShD.transpose(1, 2)

    return attend


def _dense(mask: WholeMask, length: int, device: torch.device) -> torch.Tensor:
    """``[1, 1, S, S]``, true where a token sees another, as transformers makes it for sdpa."""
    if length**2 > _LARGEST_MASK:
        raise UnsupportedModelError(
            f"the program's own function under attn_implementation='sdpa' needs a mask of {length} x {length} tokens "
            f"for this window, these chunks or packed documents, more than {_LARGEST_MASK} bytes. Leave transformers' "
            "function there, or give it shorter sequences"
        )
    places = torch.arange(length, device=device)
    return mask.rule(length, device)(0, 0, places[:, None], places[None])[None, None]


def _plain(core: Core) -> Attend:
    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: WholeMask | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        return attend_plainly(q, k, v, mask, scaling, arguments.get("softcap"), arguments.get("s_aux"))

    return attend


def _flash(core: Core) -> Attend:
    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: WholeMask | None,
        scaling: float | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        plain = under_own_name(module, core.name)
        with counted_attention(q.device) if "dropout" in arguments else contextlib.nullcontext():
            out_BShD, _ = flash_attention_forward(plain, q, k, v, None, scaling=scaling, is_causal=True, **arguments)
        return out_BShD.transpose(1, 2)

    return attend


def _flex(core: Core) -> Attend:
    # A million tokens have a mask of 2**26 blocks: only the last two are kept, as layers with a window and layers
    # without one take turns.
    block_mask = functools.lru_cache(maxsize=2)(_block_mask)

    def attend(
        module: torch.nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: WholeMask | None,
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


def _block_mask(mask: WholeMask | None, length: int, device: torch.device) -> Any:
    """Of the whole sequence, where transformers' would be of the shard; one row, which flex repeats for the batch."""
    rule = causal_mask_function if mask is None else mask.rule(length, device)
    return flex_attention_mask(1, length, length, mask_function=rule, device=device)


def under_own_name(module: torch.nn.Module, name: str) -> Any:
    """An attention module as flash attention's function is to see it: with the name that transformers has for its core.

    Under the private name transformers would load the kernel anew, and register it over the model's own entry.
    """
    return _Seen(module, config=_Seen(module.config, _attn_implementation=name))


class _Seen:
    """An object with some of its attributes replaced, for whoever is given this instead."""

    def __init__(self, seen: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _seen=seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_seen"], name)

"""Stand-ins of flash attention 2 (flash-attn 2.8.3), 3 (its hopper interface) and 4, less 4's arguments for inference.

Names, order and defaults of the arguments are the real ones'. What is not computed here has to be at its default.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from tests.stand_ins import attend

_LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_OPTIONS = {
    "2": "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False",
    "3": "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, "
    "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "sm_margin=0, return_attn_probs=False",
    "4": "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False",
}
_VARLEN_OPTIONS = {
    "2": f"{_LENGTHS}, {_OPTIONS['2']}, block_table=None",
    "3": f"{_LENGTHS}, seqused_q=None, seqused_k=None, {_OPTIONS['3']}",
    "4": f"{_LENGTHS.replace(',', '=None,')}=None, seqused_q=None, seqused_k=None, page_table=None, {_OPTIONS['4']}",
}
_HOMES = {"2": "flash_attn", "3": "flash_attn_interface", "4": "flash_attn.cute"}
_NAMES = ("softmax_scale", "causal", "window_size", "softcap", "learnable_sink")
_COMPUTED = {*"qkv", *_LENGTHS.split(", "), *_NAMES, "deterministic"}


def modules() -> dict[str, ModuleType]:
    """Return modules by the names that transformers imports."""
    found = {"flash_attn.bert_padding": {"pad_input": _not_reached, "unpad_input": _not_reached}}
    for kind, home in _HOMES.items():
        dense, varlen = (_function(kind, f"q, k, v, {options[kind]}") for options in (_OPTIONS, _VARLEN_OPTIONS))
        found[home] = {"flash_attn_func": dense, "flash_attn_varlen_func": varlen}
        found[home] |= {} if kind == "4" else {"flash_attn_with_kvcache": _not_reached}
    made = {name: importlib.util.module_from_spec(ModuleSpec(name, None)) for name in found}
    for name, module in made.items():
        vars(module).update(found[name])
    made["flash_attn"].__version__ = "2.8.3"
    return made


def _not_reached(*args: Any, **kwargs: Any) -> None:
    """Stand in for generation with a cache, and for padding masks, which are dropped before the cut."""
    raise AssertionError("a cache or a padding mask reached flash attention")


def _function(kind: str, signature: str) -> Callable[..., Any]:
    bind = eval(f"lambda {signature}: locals()")
    defaults = {name: each.default for name, each in inspect.signature(bind).parameters.items()}

    @functools.wraps(bind)  # with its signature, which transformers reads
    def run(*args: Any, **kwargs: Any) -> Any:
        given = bind(*args, **kwargs)
        others = {name: x for name, x in given.items() if name not in _COMPUTED and x != defaults[name]}
        assert not others, f"not computed here: {others}"
        lengths = [given[name] for name in _LENGTHS.split(", ") if name in given]
        options = [given.get(name) for name in _NAMES]
        options[2] = options[2][0]
        name, attention = (f"{kind} varlen", attend.varlen) if lengths else (kind, attend.dense)
        out = attention(name, given["q"], given["k"], given["v"], *lengths, *options)
        return (out, None) if kind == "4" else out

    return run

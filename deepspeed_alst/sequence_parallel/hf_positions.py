"""Patches of the model parts that depend on the sequence length or on a token's position in its row.

All other parts use ``position_ids``, which are the whole sequence's already.

Legend: B batch, s tokens of this rank's shard, H heads, D head dim.
"""

import weakref
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError

_LENGTH_DEPENDENT = ("dynamic", "longrope")


def give_whole_length(model: torch.nn.Module, calls: ForwardContext, patches: PatchSet) -> None:
    """Make rotary embeddings of a length-dependent type use the whole sequence's length.

    They read the highest position. An extra one, the whole sequence's highest, is appended, and its output cut off:
    ``(x, position_ids [..., s]) -> [..., s, D]``, one tensor or two.
    """

    def with_highest(positions: torch.Tensor) -> torch.Tensor:
        return torch.cat([positions, positions.new_full((*positions.shape[:-1], 1), calls.highest)], dim=-1)

    @torch.compiler.disable
    def append(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if calls.whole:
            return None
        name = type(module).__name__
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedModelError(
                f"{name} depends on the sequence length and is recomputed in the backward, when another batch may have "
                "gone forward: it does not support activation checkpointing under sequence parallelism"
            )
        if calls.highest is None:
            raise UnsupportedModelError(f"{name} was called before the model: the sequence length is not known")
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": with_highest(kwargs["position_ids"])}
        x, positions, *rest = args
        return (x, with_highest(positions), *rest), kwargs

    @torch.compiler.disable
    def cut(module: torch.nn.Module, args: Any, output: Any) -> Any:
        return None if calls.whole else tree_map_only(torch.Tensor, lambda each: each[..., :-1, :], output)

    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        if any(isinstance(each, str) and any(name in each for name in _LENGTH_DEPENDENT) for each in kinds):
            patches.hook(module, "forward_pre", append, with_kwargs=True)
            patches.hook(module, "forward", cut)


def scale_queries_by_position(model: torch.nn.Module, sp_rank: int, calls: ForwardContext, patches: PatchSet) -> None:
    """Replace Llama 4's scaling of queries by their position in the shard by that of the whole sequence."""
    tempered: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()

    def off(module: torch.nn.Module, args: Any) -> None:
        if not calls.whole:
            module.attn_temperature_tuning = False

    def on(module: torch.nn.Module, args: Any, output: Any) -> None:
        module.attn_temperature_tuning = tempered[module]

    for module in model.modules():
        if type(module).__name__ == "Llama4TextAttention" and module.attn_temperature_tuning and not module.use_rope:
            tempered[module] = module.attn_temperature_tuning
            patches.hook(module, "forward_pre", off)
            patches.hook(module, "forward", on, always_call=True)

    def scale(module: torch.nn.Module, query_BHsD: torch.Tensor) -> torch.Tensor:
        if module not in tempered:
            return query_BHsD
        s = query_BHsD.shape[2]
        positions = torch.arange(sp_rank * s, (sp_rank + 1) * s, device=query_BHsD.device).float()
        steps = torch.floor((positions + 1.0) / module.floor_scale)
        scales_s1 = (torch.log1p(steps) * module.attn_scale + 1.0)[:, None]
        return (query_BHsD * scales_s1).to(query_BHsD.dtype)

    if tempered:
        calls.scale_queries = scale

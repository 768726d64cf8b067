"""Patches of the model parts that depend on the sequence length or on a token's own position.

Most of a model uses ``position_ids``, which are the whole sequence's already. Two parts need more:

- a rotary embedding whose frequencies depend on the length (dynamic, longrope) reads the highest position that it gets.
  It gets an extra one, the whole sequence's highest, and its output for that position is cut off;
- Llama 4 scales the queries of layers without rotary embedding by their position in the row, which it counts itself.

Legend: B batch, s tokens of this rank's shard, H heads, D head dim.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types whose frequencies depend on the sequence length."""

_TEMPERATURE = "attn_temperature_tuning"
_TEMPERED = "Llama4TextAttention"

ScaleQueries = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]


def give_whole_length(model: torch.nn.Module, calls: ForwardContext, patches: PatchSet) -> None:
    """Make rotary embeddings use the whole sequence's length; ``patches.close()`` undoes it."""
    for module in model.modules():
        if depends_on_length(module):
            hooks = _WholeLength(module, calls)
            patches.hook(module, "forward_pre", hooks.before, with_kwargs=True)
            patches.hook(module, "forward", hooks.after)


def depends_on_length(module: torch.nn.Module) -> bool:
    """Return True if a module is a rotary embedding of a length-dependent type."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    return any(isinstance(each, str) and any(name in each for name in LENGTH_DEPENDENT) for each in kinds)


class _WholeLength:
    """Hooks of one rotary embedding: ``(x, position_ids [..., s]) -> [..., s, D]``, one tensor or two."""

    def __init__(self, module: torch.nn.Module, calls: ForwardContext) -> None:
        self._name, self._calls = type(module).__name__, calls

    @torch.compiler.disable
    def before(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if self._calls.whole:
            return None
        if torch._C._current_graph_task_id() != -1:
            raise UnsupportedModelError(
                f"{self._name} depends on the sequence's length, and is part of a layer that is recomputed in the "
                "backward, when another batch may have gone forward: not available with activation checkpointing under "
                "sequence parallelism"
            )
        if self._calls.highest is None:
            raise UnsupportedModelError(f"{self._name} was called before the model: the sequence's length is not known")
        if "position_ids" in kwargs:
            return args, kwargs | {"position_ids": self._with_highest(kwargs["position_ids"])}
        x, positions, *rest = args
        return (x, self._with_highest(positions), *rest), kwargs

    def _with_highest(self, positions: torch.Tensor) -> torch.Tensor:
        highest = positions.new_full((*positions.shape[:-1], 1), self._calls.highest)
        return torch.cat([positions, highest], dim=-1)

    @torch.compiler.disable
    def after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        if self._calls.whole:
            return None
        if isinstance(output, torch.Tensor):
            return output[..., :-1, :]
        return tuple(each[..., :-1, :] for each in output)


def take_temperatures(model: torch.nn.Module, sp_rank: int, calls: ForwardContext, patches: PatchSet) -> ScaleQueries:
    """Disable the layers' query scaling by position in the shard; return the function that replaces it.

    The function takes an attention module and its queries, ``[B, H, s, D]``, of this rank's shard.
    """
    tempered: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()

    def off(module: torch.nn.Module, args: Any) -> None:
        if not calls.whole:
            module.attn_temperature_tuning = False

    def on(module: torch.nn.Module, args: Any, output: Any) -> None:
        module.attn_temperature_tuning = tempered[module]

    for module in model.modules():
        if is_tempered(module):
            tempered[module] = getattr(module, _TEMPERATURE)
            patches.hook(module, "forward_pre", off)
            patches.hook(module, "forward", on, always_call=True)

    def scale(module: torch.nn.Module, query_BHsD: torch.Tensor) -> torch.Tensor:
        if module not in tempered:
            return query_BHsD
        s = query_BHsD.shape[2]
        places = torch.arange(sp_rank * s, (sp_rank + 1) * s, device=query_BHsD.device).float()
        steps = torch.floor((places + 1.0) / module.floor_scale)
        scales_s1 = (torch.log1p(steps) * module.attn_scale + 1.0)[:, None]
        return (query_BHsD * scales_s1).to(query_BHsD.dtype)

    return scale


def is_tempered(module: torch.nn.Module) -> bool:
    """Return True if a module is an attention that scales its queries by a position that it counts itself."""
    return type(module).__name__ == _TEMPERED and bool(getattr(module, _TEMPERATURE)) and not module.use_rope

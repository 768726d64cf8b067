"""Liger's kernels in a model: requested parts, available parts, and the report on the others."""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from deepspeed_alst.config.near_misses import nearest
from deepspeed_alst.config.schema import AlstConfig, LigerConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.distributed.collectives import gather_objects, raise_on_all_ranks
from deepspeed_alst.errors import AlstError, SetupError, UnsupportedModelError
from deepspeed_alst.integrations.hf_liger_patches import CannotPatchError, has_ligers_modules, patch

_KEY = "alst.liger_kernel"
_LOSS = "fused_linear_cross_entropy"
_PARTS = tuple(part for part in LigerConfig.model_fields if part != _LOSS)
# Liger's loss patches: this package computes the loss in tiles.
_NEVER = ("cross_entropy", _LOSS)


@dataclass(frozen=True)
class LigerUse:
    """Use of Liger's kernels in a model."""

    words: str
    makes_loss: bool = False
    """True if a tiled loss with backend "auto" uses Liger's kernel."""
    patched: bool = False
    """True if modules of the model are Liger's."""


@dataclass
class _Wish:
    """Parsed ``alst.liger_kernel``: required, optional and excluded parts."""

    everything: bool
    """True if the key is ``true``: an error if no part is available."""
    parts: dict[str, bool | None]
    """Requests by part; None is "if available"."""
    loss: bool | None
    refused: dict[str, str] = field(default_factory=dict)
    """Unavailable parts, with the reasons."""

    @classmethod
    def read(cls, value: Any) -> "_Wish":
        block = value if isinstance(value, LigerConfig) else LigerConfig()
        parts = {part: getattr(block, part) for part in _PARTS}
        return cls(value is True, parts, block.fused_linear_cross_entropy)

    @property
    def asks_for_modules(self) -> bool:
        """True if any part but the loss is requested by name."""
        return self.everything or any(self.parts.values())

    @property
    def required(self) -> str | None:
        """Key that makes it an error if Liger cannot run, or None."""
        if self.everything:
            return _KEY
        asked = [part for part, value in {**self.parts, _LOSS: self.loss}.items() if value]
        return f"{_KEY}.{asked[0]}" if asked else None

    def key_of(self, part: str) -> str | None:
        """Return the key that requests a part by name, or None."""
        if self.everything:
            return _KEY
        names = ("geglu", "swiglu") if part == "geglu" else (part,)
        return next((f"{_KEY}.{name}" for name in names if self.parts[name]), None)

    def missing_of(self, counts: dict[str, int]) -> str | None:
        """Return the key of a requested part that was not applied, or None."""
        if self.everything:
            return None if counts else _KEY
        there = {*counts, *(["swiglu"] if "geglu" in counts else [])}
        return next((f"{_KEY}.{part}" for part, value in self.parts.items() if value and part not in there), None)

    def arguments(self, apply: Callable[..., None]) -> dict[str, bool]:
        """Return the arguments of Liger's function for a family; parts not requested keep its default."""
        parameters = inspect.signature(apply).parameters
        # Functions of composite models pass unknown arguments on.
        hands_on = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        wanted = {**self.parts, **dict.fromkeys([*self.refused, *_NEVER], False)}
        if wanted["geglu"] is None:
            wanted["geglu"] = wanted["swiglu"]
        return {
            name: value
            for name, value in wanted.items()
            if value is not None and (name in parameters or (hands_on and name not in _NEVER))
        }


def use_liger(model: torch.nn.Module, config: AlstConfig, device: str, group: Any, patches: PatchSet) -> LigerUse:
    """Apply Liger's kernels as set in ``alst.liger_kernel``, before any other patch of the modules.

    Collective over ``group``: if one rank cannot run Liger, none does. The reason is reported for ``"auto"`` and raised
    for parts requested by name.

    Args:
        model: a transformers model, or a wrapper around one.
        config: this package's config.
        device: device type of the engine.
        group: all ranks, over gloo; None if ranks are independent.
        patches: undoes everything.

    Raises:
        SetupError: requested by name, and Liger cannot run here.
        UnsupportedModelError: requested by name, and Liger does not support the model, or a part of it.
    """
    loss = config.tiled_loss()
    if loss is not None and loss.backend == "liger":
        _together(lambda: check_liger_runs("alst.tiled_logits_loss", device), group)
    if config.alst.liger_kernel is False or not isinstance(model, torch.nn.Module):  # DeepSpeed raises
        return LigerUse("off")
    wish, base = _Wish.read(config.alst.liger_kernel), base_model(model)
    reason = _first_reason(_together(lambda: _reason_against(wish, base, device), group), group)
    if reason:
        return LigerUse(f"not used: {reason}")
    return _together(lambda: _patch(wish, base, patches), group)


def check_liger_runs(key: str, device: str) -> None:
    """Raise if Liger's kernels cannot run on a device.

    Raises:
        SetupError: with the key that requests them.
    """
    reason = _reason_against_setup(device, interpreted=True)
    if reason:
        raise SetupError(f"{key}: {reason}")


def _together(call: Callable[[], Any], group: Any) -> Any:
    """Return ``call()``; an AlstError of one rank is raised on all."""
    if group is None:
        return call()
    result, error = None, None
    try:
        result = call()
    except AlstError as raised:
        error = raised
    raise_on_all_ranks(error, group)
    return result


def _first_reason(mine: str | None, group: Any) -> str | None:
    """Return the first reason of all ranks; without a group this rank's."""
    everyone = [mine] if group is None else gather_objects(mine, group)
    return next((f"{reason} (rank {rank})" if rank else reason for rank, reason in enumerate(everyone) if reason), None)


def _reason_against_setup(device: str, interpreted: bool) -> str | None:
    """Return why Liger's kernels cannot run on a device type; ``interpreted`` permits Triton's interpreter."""
    in_interpreter = os.environ.get("TRITON_INTERPRET", "0") != "0"
    if in_interpreter and not interpreted:
        return "TRITON_INTERPRET is set, which makes its kernels a thousand times slower; ask for it by name"
    if not in_interpreter and device != "cuda":
        return (
            f"Liger's kernels need a GPU, and the engine is on {device}; to try them on CPU, a thousand times slower, "
            "set TRITON_INTERPRET=1 in the environment"
        )
    try:
        _functions()
    except ImportError as error:
        return f"liger_kernel cannot be imported ({error}); pip install liger-kernel"
    return None


def _functions() -> dict[str, Callable[..., None]]:
    """Return Liger's functions by model_type."""
    # The import takes seconds.
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return MODEL_TYPE_TO_APPLY_LIGER_FN


def _reason_against(wish: _Wish, base: torch.nn.Module, device: str) -> str | None:
    """Return why no part of Liger is used, or None.

    Raises:
        AlstError: the reason, if the key requires Liger.
    """
    reason, kind, near = _reason_against_setup(device, interpreted=wish.required is not None), SetupError, ""
    if reason is None and any(param.dtype == torch.float64 for param in base.parameters()):
        reason, kind = "the model is fp64, and Liger's kernels compute in fp32", UnsupportedModelError
    if reason is None and not has_ligers_modules(base):
        model_type = getattr(getattr(base, "config", None), "model_type", None)
        if model_type not in _functions() and not (wish.loss and not wish.asks_for_modules):
            reason, kind = f"model_type={model_type!r} is none of Liger's families", UnsupportedModelError
            near = nearest(str(model_type), _functions()) if wish.required else ""
    if reason and wish.required:
        raise kind(f"{wish.required}: {reason}.{near}")
    return reason


def _patch(wish: _Wish, base: torch.nn.Module, patches: PatchSet) -> LigerUse:
    """Apply the available parts of those requested.

    Raises:
        UnsupportedModelError: a part requested by name is not available.
    """
    makes_loss = wish.loss is not False
    if has_ligers_modules(base):
        return LigerUse("the model was patched by Liger before, and is left as it is", makes_loss, patched=True)
    apply = _functions().get(base.config.model_type)
    if apply is None or all(value is False for value in wish.parts.values()):
        return LigerUse("the loss alone" if makes_loss else "off", makes_loss)
    with PatchSet().rollback_on_error() as done:
        try:
            counts = _patch_what_fits(wish, base, apply, done)
        except AlstError:
            raise
        # Liger's functions raise many types of errors.
        except Exception as error:
            reason = f"Liger's function for {base.config.model_type} stopped with {type(error).__name__}: {error}"
            if wish.required:
                raise UnsupportedModelError(f"{wish.required}: {reason}") from error
            return LigerUse(f"not used: {reason}")
        found = ", ".join(f"{part} ({number})" for part, number in sorted(counts.items())) or "nothing"
        missing = wish.missing_of(counts)
        if missing:
            raise UnsupportedModelError(
                f"{missing}: Liger has no such part for {type(base).__name__}; of what is asked for it has {found}. "
                "Leave it out."
            )
        patches.absorb(done)
    refused = "".join(f"; not {part}: {reason}" for part, reason in wish.refused.items())
    return LigerUse(f"{found} in {type(base).__name__}{refused}", makes_loss, patched=bool(counts))


def _patch_what_fits(
    wish: _Wish, base: torch.nn.Module, apply: Callable[..., None], patches: PatchSet
) -> dict[str, int]:
    """Patch the model, dropping unsupported parts one by one unless they are requested by name."""
    while True:
        try:
            return patch(base, apply, wish.arguments(apply), patches)
        except CannotPatchError as error:
            key = wish.key_of(error.part)
            if key or error.part in wish.refused:
                raise UnsupportedModelError(f"{key}: {error}. Set {_KEY}.{error.part} to false.") from None
            wish.refused[error.part] = str(error)

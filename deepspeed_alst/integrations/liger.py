"""Liger's kernels in a model: requested parts, available parts, and the report on the others."""

import functools
import inspect
import os
from collections import Counter
from typing import Any, NamedTuple

import torch

from deepspeed_alst.config.near_misses import nearest
from deepspeed_alst.config.schema import AlstConfig, LigerConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.distributed.collectives import gather_objects, raise_on_all_ranks
from deepspeed_alst.errors import AlstError, SetupError, UnsupportedModelError
from deepspeed_alst.integrations.hf_liger_patches import is_ligers, patch

_KEY = "alst.liger_kernel"
_LOSS = "fused_linear_cross_entropy"
_SKIP_LOGITS = "skip_logits"


class LigerUse(NamedTuple):
    """Use of Liger's kernels in a model."""

    words: str
    makes_loss: bool = False
    """True if a tiled loss with backend "auto" uses Liger's kernel."""
    possible: bool = True
    """False if Liger cannot be used; ``words`` hold the reason."""


def use_liger(model: torch.nn.Module, config: AlstConfig, device: str, group: Any, patches: PatchSet) -> LigerUse:
    """Apply Liger's kernels as set in ``alst.liger_kernel``, before any other patch of the modules.

    Collective over ``group``: if one rank cannot use Liger, none does. The reason is reported for ``"auto"`` and raised
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
    loss, use, error = config.tiled_loss(), LigerUse("off"), None
    with PatchSet().rollback_on_error() as done:
        try:
            if loss is not None and loss.backend == "liger":
                check_liger_runs("alst.tiled_logits_loss", device)
            # DeepSpeed raises for other objects than modules.
            if config.alst.liger_kernel is not False and isinstance(model, torch.nn.Module):
                use = _use(base_model(model), config.alst.liger_kernel, device, done)
        except AlstError as raised:
            error = raised
        if group is not None:
            raise_on_all_ranks(error, group)
        elif error is not None:
            raise error
        everyone = [use] if group is None else gather_objects(use, group)
        rank, use = next(((rank, each) for rank, each in enumerate(everyone) if not each.possible), (0, use))
        if not use.possible:
            done.close()
        patches.absorb(done)
    return use._replace(words=f"{use.words} (rank {rank})") if rank else use


def use_liger_without_data(model: torch.nn.Module, config: AlstConfig, patches: PatchSet) -> None:
    """Apply Liger's kernels to a model on fake tensors as on a GPU, without launching them, if Liger is installed.

    Raises:
        UnsupportedModelError: requested by name, and Liger does not support the model, or a part of it.
    """
    if config.alst.liger_kernel is False or _reason_against_setup("cuda", interpreted=False):
        return
    from deepspeed_alst.kernels.liger import skip_fake_launches

    skip_fake_launches(patches)
    _use(base_model(model), config.alst.liger_kernel, "cuda", patches)


def check_liger_runs(key: str, device: str) -> None:
    """Raise if Liger's kernels cannot run on a device.

    Raises:
        SetupError: with the key that requests them.
    """
    reason = _reason_against_setup(device, interpreted=True)
    if reason:
        raise SetupError(f"{key}: {reason}")


def use_own_loss(model: torch.nn.Module, patches: PatchSet) -> None:
    """Make a Liger-patched model use its head and ``loss_function``; other models stay unchanged.

    The HF Trainer patches with ``use_liger_kernel``, user code with Liger's functions, before or after the model is
    built. With ``skip_logits=False`` Liger's ``lce_forward`` calls the head and ``self.loss_function``, as every other
    forward does; under this package these are the tiled head and the loss of the full sequence.
    """
    base = base_model(model)
    before = base.forward
    if not is_ligers(before) or _SKIP_LOGITS not in inspect.signature(before).parameters:
        return

    # PEFT's wrapper calls forward directly, bypassing hooks. A method, so that a copy of the model binds its own.
    @functools.wraps(before.__func__)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return before.__func__(self, *args, **{**kwargs, _SKIP_LOGITS: False})

    patches.forward(base, forward)


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
    try:  # takes seconds
        import liger_kernel.ops.backends._triton.cross_entropy  # noqa: F401
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # noqa: F401
    except ImportError as error:
        return f"liger_kernel cannot be imported ({error}); pip install 'liger-kernel>=0.8.5'"
    return None


def _use(base: torch.nn.Module, value: Any, device: str, patches: PatchSet) -> LigerUse:
    """Apply the available parts of those requested.

    Raises:
        AlstError: Liger, or a part of it, is requested by name and not available.
    """
    block = value if isinstance(value, LigerConfig) else LigerConfig()
    # By part, the key that makes it an error if the part is not available.
    asked = {part: f"{_KEY}.{part}" for part, wanted in block if wanted}
    if value is True:
        asked = dict.fromkeys(LigerConfig.model_fields, _KEY)
    required = next(iter(asked.values()), None)

    def unused(reason: str, kind: type[AlstError] = UnsupportedModelError, hint: str = "") -> LigerUse:
        if required:
            raise kind(f"{required}: {reason}.{hint}")
        return LigerUse(f"not used: {reason}", possible=False)

    reason = _reason_against_setup(device, interpreted=required is not None)
    if reason:
        return unused(reason, SetupError)
    if any(param.dtype == torch.float64 for param in base.parameters()):
        return unused("the model is fp64, and Liger's kernels compute in fp32")
    makes_loss = block.fused_linear_cross_entropy is not False
    # Its own forward may be Liger's too, for the loss.
    inner = [module for module in base.modules() if module is not base]
    if any(is_ligers(module) or is_ligers(vars(module).get("forward")) for module in inner):
        return LigerUse("the model was patched by Liger before, and is left as it is", makes_loss)
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as FAMILIES

    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        if asked.keys() == {_LOSS}:
            return LigerUse("the loss alone", makes_loss)
        return unused(f"model_type={model_type!r} is none of Liger's families", hint=nearest(str(model_type), FAMILIES))
    # This package computes the loss in tiles. Where the families have geglu, swiglu speaks for it.
    wanted = {**dict(block), "cross_entropy": False, _LOSS: False}
    if block.geglu is None:
        wanted["geglu"] = block.swiglu
    try:
        counts, refused = patch(base, FAMILIES[model_type], wanted, patches)
    # Liger's functions raise many types of errors.
    except Exception as error:
        return unused(f"Liger's function for {model_type} stopped with {type(error).__name__}: {error}")
    return LigerUse(_describe(type(base).__name__, counts, refused, asked), makes_loss)


def _describe(model: str, counts: Counter[str], refused: dict[str, str], asked: dict[str, str]) -> str:
    """Describe the parts that are used and those that are not.

    Raises:
        UnsupportedModelError: a part requested by name is not used.
    """
    for part, reason in refused.items():
        key = asked.get(part) or (asked.get("swiglu") if part == "geglu" else None)
        if key:
            raise UnsupportedModelError(f"{key}: {reason}. Set {_KEY}.{part} to false.")
    words = f"{', '.join(f'{part} ({number})' for part, number in sorted(counts.items())) or 'nothing'} in {model}"
    used = {*counts, _LOSS, *(["swiglu"] if counts["geglu"] else [])}
    for part, key in asked.items():
        # Of the parts that `true` asks for, a family has some.
        if part not in used and not (key == _KEY and counts):
            raise UnsupportedModelError(
                f"{key}: Liger has no such part; of what is asked for it has {words}. Leave it out."
            )
    return words + "".join(f"; not {part}: {reason}" for part, reason in refused.items())

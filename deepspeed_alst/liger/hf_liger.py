"""Liger's kernels in one model, with undo.

Liger's functions patch a model's modules, and global names in transformers' modeling files that all models of a family
share. All of it is undone at once, and the patch of a module is applied again if it computes what the module does.
RoPE, which is called by a global name, reaches the attention through a copy of its forward.
"""

import inspect
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from deepspeed_alst.config.config_file import nearest
from deepspeed_alst.config.schema import AlstConfig, LigerConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import ABSENT, PatchSet, copy_function, set_entry
from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.distributed.collectives import agree, gather_objects
from deepspeed_alst.errors import AlstError, SetupError, UnsupportedModelError
from deepspeed_alst.liger.feature import is_from_liger

_KEY = "alst.liger_kernel"
_LOSS = "fused_linear_cross_entropy"
# Activations that Liger's modules compute, whatever the config says.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "swiglu": F.silu,
    "geglu": lambda x: F.gelu(x, approximate="tanh"),
    "relu_squared": lambda x: F.relu(x).square(),
}
_GATED = {"swiglu", "geglu"}
_NO_DATA = "meta"  # device type of a measurement, which launches no kernel
_IN_TILES = "in tiles, this package's closed form needs fewer bytes per token"
_IN_CHUNKS = "in chunks, a kernel that rotates q and k at once needs both projections for either"
_PARTS = ("rms_norm", "layer_norm", "rope", *_ACTIVATIONS)
_Change = tuple[dict[str, Any], str, Any]
"""A namespace, a name in it and its new value."""


class LigerUse(NamedTuple):
    """Use of Liger's kernels in a model."""

    summary: str
    """Parts in use, or the reason why Liger cannot be."""
    possible: bool = True


def use_liger(spec: ModelSpec, config: AlstConfig, device: str, group: Any, patches: PatchSet) -> LigerUse:
    """Call ``apply_liger`` with effect on all ranks or none. Collective over ``group``, over gloo."""
    with PatchSet().rollback_on_error() as done:
        with agree(group):
            use = apply_liger(spec, config, device, done)
        everyone = enumerate(gather_objects(use, group))
        rank, use = next(((rank, each) for rank, each in everyone if not each.possible), (0, use))
        if not use.possible:
            done.close()
        patches.callback(done.close)
    return use._replace(summary=f"{use.summary} (rank {rank})") if rank else use


def use_liger_without_data(spec: ModelSpec, config: AlstConfig, patches: PatchSet) -> None:
    """Apply Liger's kernels to a model on fake tensors as on a GPU, without launching them, if Liger is installed.

    Raises:
        UnsupportedModelError: a part is requested by name, and Liger does not support it for the model.
    """
    if config.alst.liger_kernel is False or _unavailable_reason(_NO_DATA, interpreted=True):
        return
    from deepspeed_alst.kernels.registry import skip_fake_launches

    skip_fake_launches(patches)
    apply_liger(spec, config, _NO_DATA, patches)


def check_liger_runs(key: str, device: str) -> None:
    """Raise SetupError with the key that requests them if Liger's kernels cannot run on a device."""
    if reason := _unavailable_reason(device, interpreted=True):
        raise SetupError(f"{key}: {reason}")


def _unavailable_reason(device: str, interpreted: bool) -> str | None:
    """Return why Liger's kernels cannot run on a device type; ``interpreted`` permits Triton's interpreter."""
    in_interpreter = os.environ.get("TRITON_INTERPRET", "0") != "0"
    if in_interpreter and not interpreted and device != _NO_DATA:
        return "TRITON_INTERPRET is set, with which its kernels are a thousand times slower; set the key to true"
    if not in_interpreter and device not in ("cuda", _NO_DATA):
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


def apply_liger(spec: ModelSpec, config: AlstConfig, device: str, patches: PatchSet) -> LigerUse:
    """Apply Liger's kernels as set in ``alst.liger_kernel``, on this rank, before any other patch of the modules.

    The reason against them is reported for ``"auto"`` and raised for parts requested by name. MLPs that
    ``tiled_mlp_compute`` runs get Liger's SwiGLU only by name: in tiles of one size the closed form needs fewer bytes.
    So do layers in chunks its RoPE: without it they skip the projection that they do not need.
    ``device`` is the engine's device type.

    Raises:
        SetupError: Liger cannot run here.
        UnsupportedModelError: it does not support the model, or a part of it.
    """
    value, loss = config.alst.liger_kernel, config.tiled_loss()
    if loss is not None and loss.backend == "liger":
        check_liger_runs("alst.tiled_logits_loss", device)
    if value is False:
        return LigerUse("off")
    block = value if isinstance(value, LigerConfig) else LigerConfig()
    # By part, the key that is named in the error if the part is not available.
    requested = {part: f"{_KEY}.{part}" for part, wanted in block if wanted}
    if value is True:
        requested = dict.fromkeys(LigerConfig.model_fields, _KEY)
    has_tiles = config.alst.tiled_mlp_compute is not None and "swiglu" not in requested
    skip = dict.fromkeys(_GATED - requested.keys(), _IN_TILES) if has_tiles else {}
    if config.alst.memory_lean_layer is not None and "rope" not in requested:
        skip["rope"] = _IN_CHUNKS
    return _apply_parts(spec, block, requested, skip, device, patches)


def _apply_parts(
    spec: ModelSpec, block: LigerConfig, requested: dict[str, str], skip: dict[str, str], device: str, patches: PatchSet
) -> LigerUse:
    base, required = spec.model, next(iter(requested.values()), None)

    def unused(reason: str, kind: type[AlstError] = UnsupportedModelError, hint: str = "") -> LigerUse:
        if required:
            raise kind(f"{required}: {reason}.{hint}")
        return LigerUse(f"not used: {reason}", possible=False)

    if reason := _unavailable_reason(device, interpreted=required is not None):
        return unused(reason, SetupError)
    if any(param.dtype == torch.float64 for param in base.parameters()):
        return unused("the model is fp64, and Liger's kernels compute in fp32")
    # Its own forward may be Liger's too, for the loss.
    inner = [module for module in base.modules() if module is not base]
    if any(is_from_liger(module) or is_from_liger(vars(module).get("forward")) for module in inner):
        return LigerUse("the program has patched the model with Liger; nothing is changed")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as FAMILIES

    model_type = getattr(getattr(base, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        if requested.keys() == {_LOSS}:
            return LigerUse("the loss only")
        return unused(f"Liger does not support model_type={model_type!r}", hint=nearest(str(model_type), FAMILIES))
    # This package computes the loss in tiles. The key swiglu also covers the families with geglu.
    wanted = {**dict(block), "cross_entropy": False, _LOSS: False}
    if block.geglu is None:
        wanted["geglu"] = block.swiglu
    # At an op's first use Liger warns that its backends for other hardware, such as Ascend, cannot be imported.
    registry, others = logging.getLogger("liger_kernel.backends.registry"), re.compile("Backend impl '[^']*[.]_(?!tri)")
    patches.callback(registry.removeFilter, keep := lambda record: not others.match(record.getMessage()))
    registry.addFilter(keep)
    try:
        counts, refused = _patch(base, FAMILIES[model_type], wanted, skip, patches)
    # Liger's functions raise many types of errors.
    except Exception as error:
        return unused(f"Liger's function for {model_type} raised {type(error).__name__}: {error}")
    return LigerUse(_describe(spec.name, counts, refused, requested))


def _describe(model: str, counts: Counter[str], refused: dict[str, str], requested: dict[str, str]) -> str:
    """Describe the parts that are used and those that are not; raise for one requested by name that is not."""
    for part, reason in refused.items():
        key = requested.get(part) or (requested.get("swiglu") if part == "geglu" else None)
        if key:
            raise UnsupportedModelError(f"{key}: {reason}. Set {_KEY}.{part} to false.")
    summary = f"{', '.join(f'{part} ({number})' for part, number in sorted(counts.items())) or 'nothing'} in {model}"
    used = {*counts, _LOSS, *(["swiglu"] if counts["geglu"] else [])}
    for part, key in requested.items():
        # `true` requests all parts, of which a family has some.
        if part not in used and not (key == _KEY and counts):
            raise UnsupportedModelError(f"{key}: Liger has no such kernel here; it has {summary}. Leave the key out.")
    return summary + "".join(f"; not {part}: {reason}" for part, reason in refused.items())


# --- Liger's patch of a family, on one model


def _patch(
    model: torch.nn.Module,
    apply: Callable[..., None],
    wanted: Mapping[str, bool | None],
    skip: dict[str, str],
    patches: PatchSet,
) -> tuple[Counter[str], dict[str, str]]:
    """Patch a model by Liger's function for its family, except parts that do not match one of its modules.

    Returns:
        The number of patched modules by part, and the reason for each part that is not. ``skip`` are
        those of modules with Linears only, as stacked experts have no closed form.
    """
    parameters = inspect.signature(apply).parameters
    changes = _changes(model, apply, {name: value for name, value in wanted.items() if name in parameters})

    def names_for(function: FunctionType) -> Mapping[str, Any]:
        return {
            name: now
            for _, name, now in changes.get(id(function.__globals__), ())
            if _part_of(now) == "rope" and isinstance(now, FunctionType) and name in function.__code__.co_names
        }

    found, tiled, refused = [], {}, {}
    for name, module in model.named_modules():
        own = [*changes.get(id(vars(module)), ()), *changes.get(id(module._modules), ())]
        forward = copy_function(type(module).forward, names_for)
        calls_rope = forward is not type(module).forward
        part = "rope" if calls_rope else next(filter(None, (_part_of(now) for *_, now in own)), None)
        # Functions of composite models use those of other families, by their defaults.
        if part is None or wanted[part] is False:
            continue
        if reason := _mismatch(name, module, part):
            refused.setdefault(part, reason)
        elif part in skip and any(isinstance(each, torch.nn.Linear) for each in module.children()):
            tiled[part] = skip[part]
        else:
            found.append((part, module, forward if calls_rope else None, own))
    counts: Counter[str] = Counter()
    for part, module, forward, own in found:
        if part not in refused:
            counts[part] += 1
            if forward is not None:
                patches.forward(module, forward)
            for change in own:
                patches.entry(*change)
    return counts, tiled | refused


def _changes(
    model: torch.nn.Module, apply: Callable[..., None], wanted: Mapping[str, bool | None]
) -> dict[int, list[_Change]]:
    """Call Liger's function and undo its changes of the model and of transformers; return them by their namespace."""
    spaces = [space for module in model.modules() for space in (vars(module), module._modules)]
    spaces += [
        vars(module)
        for name, module in sys.modules.items()
        if name.startswith("transformers.models.") and name.rpartition(".")[2].startswith("modeling_")
    ]
    # dict.items, because ACT2FN's class transforms stored values.
    before = [(space, dict(dict.items(space))) for space in [*spaces, ACT2FN]]
    changes: dict[int, list[_Change]] = {}
    try:
        apply(model=model, **{name: value for name, value in wanted.items() if value is not None})
    finally:
        for space, old in before:
            for name, now in list(dict.items(space)):
                if old.get(name, ABSENT) is not now:
                    changes.setdefault(id(space), []).append((space, name, now))
                    set_entry(space, name, old.get(name, ABSENT))
    return changes


def _part_of(thing: Any) -> str | None:
    """Return the part of ``alst.liger_kernel`` that one of Liger's objects belongs to, by its source module."""
    # Some families have a RoPE of their own: llama4_rope, qwen2vl_mrope.
    return next((part for part in _PARTS if is_from_liger(thing) and thing.__module__.endswith(part)), None)


def _mismatch(name: str, module: torch.nn.Module, part: str) -> str | None:
    """Return the reason if a module is not what Liger, which binds its forward to any module, assumes."""
    cls = type(module)
    is_layer_norm = cls is torch.nn.LayerNorm and module.weight is not None and module.bias is not None
    if part != "rope" and cls.__module__.split(".")[0] != "transformers" and not is_layer_norm:
        return f"{name} is {cls.__module__}.{cls.__name__}, not transformers'"
    if "forward" in vars(module):
        return f"{name}.forward has been replaced by the program"
    if part not in _ACTIVATIONS:
        return None
    activations = (getattr(module, key, None) for key in ("act_fn", "activation_fn", "act"))
    found = next(filter(callable, activations), None)
    if found is not None and run_isolated(_is_same_function, found, _ACTIVATIONS[part]):
        return None
    kind = "an unknown activation" if found is None else f"the activation {type(found).__name__}"
    return f"{name} has {kind}, and Liger would compute {part}"


def _is_same_function(found: Callable[..., torch.Tensor], expected: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    values = torch.linspace(-6, 6, 97, device="cpu")
    return torch.allclose(found(values), expected(values), rtol=0, atol=1e-6)

"""The two times a model is verified: before its attention is patched, and live before the engine's first forward.

The first is the census's list, or a trial of a tiny model of its kind (hf_parity_trial.py); the second compares the
model as it is, whole against split (model_check.py), and leaves it bit for bit as it was.
"""

import contextlib
import random
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.distributed.collectives import uncounted
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.random_draws.model_draws import drop_no_attention
from deepspeed_alst.verification.model_check import check_live_model
from deepspeed_alst.verification.program_code import (
    check_custom_modules,
    check_gradient_hooks,
    custom_modules,
    program_code,
)
from deepspeed_alst.verification.verified_models import RIGHT

# DeepSpeed swaps the weights' storage under ZeRO-3; submodules are saved on their own.
_NOT_SAVED = ("_parameters", "_modules")


def verify_model(spec: ModelSpec, groups: SequenceGroups, upstream: bool = False) -> str:
    """Raise unless the census found the model's family right, or a tiny model of its kind is right here.

    Collective over the groups' gloo groups. In an ``upstream`` program, written for DeepSpeed's own ALST, the code that
    it has put into the model is not tried: this package replaces it.

    Returns:
        Summary of the trial; empty for a listed family.

    Raises:
        UnsupportedModelError: the model is not right; on all ranks.
    """
    check_gradient_hooks(spec.outer)
    base = spec.model
    # Modules that were put in are tried by themselves: a tiny model would not have them.
    put_in = {f"{cls.__module__}.{cls.__qualname__}" for cls in map(type, custom_modules(base).values())}
    code = () if upstream else tuple(each for each in program_code(spec.outer) if each not in put_in)
    if base.config.model_type in RIGHT and not code:
        check_custom_modules(base, None)
        return ""
    from deepspeed_alst.verification.hf_parity_trial import check_tiny_model

    unlisted = (
        f"{type(base).__name__} (model_type='{base.config.model_type}') is none of the {len(RIGHT)} families that are "
        "verified under sequence parallelism (docs/census.md)"
    )
    if base.config.model_type in RIGHT:
        unlisted = f"{type(base).__name__} runs code of the program's own ({', '.join(code[:4])})"
    return check_tiny_model(spec, groups, unlisted, code)


class ModelCheck:
    """Compare the live model before the engine's first forward in training mode, and before the first in evaluation.

    Args:
        engine: of a session, whose model's code the trial of a small model has seen.
        spec: its model.
    """

    def __init__(self, engine: Any, spec: ModelSpec) -> None:
        self._spec = spec
        self._engine, self._checked, self._code = engine, set[bool](), program_code(engine.module)

    def run_once(self) -> None:
        """Check the model in its mode, unless that was done.

        Raises:
            UnsupportedModelError: on all ranks, where the model is not right.
        """
        model, session = self._engine.module, self._engine.alst
        if model.training in self._checked:
            return
        check_gradient_hooks(model)
        if not self._checked and program_code(model) != self._code:
            # In a thread of its own: an evaluation is without a graph, which the trial's backward needs.
            run_isolated(verify_model, self._spec, session.groups)
        began = time.perf_counter()
        with (
            untouched(model),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            session.calls.of_model_check(),
            uncounted(session.groups.sp_group),
            PatchSet() as patches,
        ):
            drop_no_attention(model, patches)
            patches.hook(model, "forward_pre", lambda *_: _forget_trace(self._engine), prepend=True)
            summary = check_live_model(self._spec, session.groups, session.calls, torch.device(self._engine.device))
        _forget_trace(self._engine)
        self._checked.add(model.training)
        if dist.get_rank() == 0:
            mode, seconds = "training" if model.training else "evaluation", time.perf_counter() - began
            # Above the Trainer's progress bar, not inside of it.
            tqdm.write(f"deepspeed_alst: model check ({mode}): {summary} ({seconds:.1f} s)", file=sys.stderr)


def _forget_trace(engine: Any) -> None:
    """Invalidate ZeRO 3's parameter fetch trace: forwards of the check and of the first step differ in their order."""
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if hasattr(offload, "get_param_coordinator"):
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()


@contextlib.contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """Restore buffers, attributes, hooks, training flags, configs and RNG states on exit; weights are not saved."""
    with ExitStack() as restore:
        saved: set[int] = set()
        for module in model.modules():
            _save(vars(module), saved, restore)
            for config in [each for each in vars(module).values() if hasattr(type(each), "to_diff_dict")]:
                _save(vars(config), saved, restore)
        restore.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            restore.callback(numpy.random.set_state, numpy.random.get_state())
        devices = {param.device.index for param in model.parameters() if param.device.type == "cuda"}
        restore.enter_context(torch.random.fork_rng([each for each in devices if each is not None]))
        yield


def _save(value: Any, saved: set[int], restore: ExitStack) -> None:
    """Restore a tensor, or a container and what is in it, in place on exit."""
    if id(value) in saved:
        return
    saved.add(id(value))
    if type(value) is torch.Tensor and not value.is_meta:
        restore.callback(_put_back, value, value.detach().clone())
    elif isinstance(value, dict | list | set):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if name not in _NOT_SAVED:
                _save(inner, saved, restore)
        # copy() keeps an OrderedDict and so the order of hooks.
        restore.callback(_refill, value, value.copy())


def _refill(container: Any, contents: Any) -> None:
    """Restore the contents of a container; unchanged dicts stay, of which some take no update."""
    if isinstance(container, list):
        container[:] = contents
    elif (
        isinstance(container, set)
        or list(container) != list(contents)
        or any(container[key] is not value for key, value in contents.items())
    ):
        container.clear()
        container.update(contents)


def _put_back(tensor: torch.Tensor, values: torch.Tensor) -> None:
    if tensor.shape != values.shape or not torch.equal(tensor, values):
        with torch.no_grad():
            tensor.set_(values) if tensor.shape != values.shape else tensor.copy_(values)

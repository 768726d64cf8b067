"""Model check of an engine before its first forward."""

import functools
import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.distributed.comm_volume import uncounted
from deepspeed_alst.random_draws.model_draws import drop_no_attention
from deepspeed_alst.verification.gradient_hooks import check_gradient_hooks
from deepspeed_alst.verification.hf_untouched import untouched
from deepspeed_alst.verification.model_check import check_live_model
from deepspeed_alst.verification.program_code import program_code
from deepspeed_alst.verification.verify_model import verify_model


class ModelCheck:
    """Compare the live model before the engine's first forward in training mode, and before the first in evaluation.

    Args:
        engine: of a session, whose model's code the trial of a small model has seen.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._checked, self._code = engine, set[bool](), program_code(engine.module)

    def run_once(self) -> None:
        """Check the model in its mode, unless that was done.

        Raises:
            UnsupportedModelError: on all ranks, where the model is not right.
        """
        engine, session = self._engine, self._engine.alst
        if engine.module.training in self._checked:
            return
        check_gradient_hooks(engine.module)
        if not self._checked and program_code(engine.module) != self._code:
            # In a thread of its own: an evaluation is without a graph, which the trial's backward needs.
            run_isolated(verify_model, engine.module, session.groups)
        _check(engine, session)
        self._checked.add(engine.module.training)


def _check(engine: Any, session: Any) -> None:
    began = time.perf_counter()
    model = engine.module
    with (
        untouched(model),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        session.calls.of_model_check(),
        uncounted(session.groups.sp_group),
        PatchSet() as patches,
    ):
        drop_no_attention(model, patches)
        forget = functools.partial(_forget_trace, engine)
        summary = check_live_model(model, session.groups, session.calls, torch.device(engine.device), forget)
    _forget_trace(engine)
    if dist.get_rank() == 0:
        mode = "training" if model.training else "evaluation"
        seconds = time.perf_counter() - began
        print(f"deepspeed_alst: model check ({mode}): {summary} ({seconds:.1f} s)", file=sys.stderr, flush=True)


def _forget_trace(engine: Any) -> None:
    """Invalidate ZeRO 3's parameter fetch trace, so that it is recorded in the first step and not here.

    Also between two forwards of the check, which compute their logits in different orders.
    """
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if hasattr(offload, "get_param_coordinator"):
        coordinator = offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

"""``seq_parallel_communication_data_type`` and ``alst.reduction``: gradients summed over all ranks."""

from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.features import Feature, RunContext, reduction_rows
from deepspeed_alst.grad_reduction.gradient_check import GradientCheck
from deepspeed_alst.grad_reduction.reduce import Reduction
from deepspeed_alst.grad_reduction.sum_pieces import load_sum_pieces
from deepspeed_alst.grad_reduction.zero_paths import install_reduction
from deepspeed_alst.sequence_parallel.session import Session

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GradReduction(Feature):
    """Gradient reduction on the path of the engine's ZeRO stage, and the check of its first average."""

    def __init__(self, session: Session, bucket: str) -> None:
        self._session, self._bucket = session, bucket

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Replace the optimizer's reduction; watch gradients for NaN and Inf, and the first average."""
        session, config = self._session, run.config
        reduction = Reduction(_DTYPES[config.seq_parallel_communication_data_type], config.alst.reduction.slice_bytes)
        adder = load_sum_pieces(run.device)
        path = install_reduction(engine, reduction, patches)
        session.watch_gradients(engine)
        session.reduction_bytes = path.bytes_sent(engine)
        engine.alst_features.gradient_check = GradientCheck(engine, session.groups, reduction.dtype, patches)
        self._rows = reduction_rows(engine, reduction, path, adder, self._bucket)

    def report(self) -> list[tuple[str, str]]:
        """Return dtypes, bytes on the wire and buffers."""
        return self._rows


class SeparateExperts(Feature):
    """Mixtures whose experts are modules of their own: every rank gathers and reduces all of them."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the blocks of experts, if there are any."""
        if next(run.spec.separate_experts(), None) is None:
            return
        from deepspeed_alst.moe.mixtures import call_together

        call_together(run.spec, run.stage, run.leaf, patches)

"""Verification of a model before it is patched, and ``alst.check_model``: of the live one before its first forward."""

from typing import Any

from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.verification.verify_model import ModelCheck, verify_model


class VerifiedModel(Feature):
    """Check that sequence parallelism is right for the model."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Look the model up in the list, or try a tiny copy of it."""
        if any(plan.row_groups > 1 for plan in self._session.heads):
            from deepspeed_alst.attention.row_attention import check_rows

            check_rows(run.spec)
        self._summary = verify_model(run.spec, self._session.groups, run.upstream is not None)

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Have the live model checked before its first forward."""
        if run.config.alst.check_model and run.upstream is None:
            engine.alst_features.model_check = ModelCheck(engine, run.spec)

    def report(self) -> list[tuple[str, str]]:
        """Return the row of a model that is not in the list."""
        return [("model", self._summary)] if self._summary else []

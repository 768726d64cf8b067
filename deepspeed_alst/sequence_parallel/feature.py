"""``sequence_parallel_size``: attention, loss and loaders over the ranks of a sequence."""

from typing import Any

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.features import Feature, RunContext
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.patch_model import patch_model
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.verification.verify_model import ModelCheck, verify_model

_WHOLE_LOSS = "of the whole sequence on every rank"
_SHARD_LOSS = (
    "of this rank's shard, which the program aggregates (DeepSpeed's mpu); TiledMLP, TiledFusedLogitsLoss: ours"
)


class SequenceParallel(Feature):
    """Ulysses sequence parallelism."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._rows: list[tuple[str, str]] = []

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Verify the model, and patch its attention, positions and loss."""
        is_upstream, groups = run.upstream is not None, self._session.groups
        summary = verify_model(run.spec, groups, is_upstream)
        if is_upstream:
            from deepspeed_alst.integrations.hf_upstream import prepare_adoption

            prepare_adoption(patches)
        attention = patch_model(run.spec, groups.sp_group, patches, self._session.calls, not is_upstream)
        self._rows = [("attention", attention), ("loss", _SHARD_LOSS if is_upstream else _WHOLE_LOSS)]
        self._rows += [("model", summary)] if summary else []

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Attach the session, and what checks the model before the first forward."""
        self._session.attach(engine)
        if run.upstream is not None:
            from deepspeed_alst.integrations.hf_upstream import UpstreamProgram

            engine.alst_features.upstream = UpstreamProgram(engine, self._session, run.upstream, patches)
        elif run.config.alst.check_model:
            engine.alst_features.model_check = ModelCheck(engine, run.spec)

    def report(self) -> list[tuple[str, str]]:
        """Return what attention and loss are."""
        return self._rows


class BatchCheck(Feature):
    """Checks that every batch is a shard of the same sequence on all ranks, and plans its offload."""

    def __init__(self, session: Session, planner: Any) -> None:
        self._session, self._planner = session, planner

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Add the check to the model's forward."""
        check_batches(run.spec, self._session.groups, self._session.calls, patches, self._planner)

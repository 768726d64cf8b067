"""``sequence_parallel_size``: attention, loss and loaders over the ranks of a sequence."""

from typing import Any

from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.kernels import define_ops
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.patch_model import patch_model
from deepspeed_alst.sequence_parallel.session import Session

_WHOLE_LOSS = "of the whole sequence on every rank"
_SHARD_LOSS = (
    "of this rank's shard, which the program aggregates (DeepSpeed's mpu); TiledMLP, TiledFusedLogitsLoss: ours"
)


class SequenceParallel(Feature):
    """Ulysses sequence parallelism."""

    def __init__(self, session: Session) -> None:
        self._session = session
        define_ops("pack_heads")  # for the trial of a tiny model too

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the model's attention, positions and loss."""
        session, is_upstream = self._session, run.upstream is not None
        attention = patch_model(run.spec, session.groups.sp_group, patches, session.calls, not is_upstream)
        loss = _SHARD_LOSS if is_upstream else _WHOLE_LOSS
        if session.splits_decoder and not run.spec.is_multimodal:
            loss = f"the program's or {type(run.spec.whole).__name__}'s own, of whole sequences"
        self._rows = [("attention", attention), ("loss", loss)]

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Attach the session."""
        self._session.attach(engine)

    def report(self) -> list[tuple[str, str]]:
        """Return the rows of attention and loss."""
        return self._rows


class BatchCheck(Feature):
    """Check that every batch is a shard of the same sequence on all ranks, which plans its offload too."""

    def __init__(self, session: Session, planner: Any) -> None:
        self._session, self._planner = session, planner

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Add the check to the model's forward."""
        check_batches(run.spec, self._session.groups, self._session.calls, patches, self._planner)

"""``alst.activation_checkpoint_cpu_offload`` and ``alst.save_attention_output``."""

from typing import TYPE_CHECKING, Any

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import agree
from deepspeed_alst.features import Feature, RunContext

if TYPE_CHECKING:
    from deepspeed_alst.offload.planner import OffloadPlanner


class ActivationOffload(Feature):
    """Activations of checkpointed layers that are kept or offloaded for the backward."""

    planner: "OffloadPlanner"

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Register with the layers' checkpoints; at SP 1, plan before each forward (under SP the batch check does)."""
        from deepspeed_alst.offload.planner import OffloadPlanner
        from deepspeed_alst.sequence_parallel.batch_check import plan_batches

        self.planner = OffloadPlanner(run.model, run.config, patches)
        if run.session is None:
            plan_batches(run.model, self.planner, patches)

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Allocate the store off the device."""
        with agree(run.control_group):
            self.planner.attach(engine, patches)

    def report(self) -> list[tuple[str, str]]:
        """Return where activations are kept."""
        return self.planner.words()

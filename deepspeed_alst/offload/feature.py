"""``alst.activation_checkpoint_cpu_offload`` and ``alst.save_attention_output``."""

from typing import TYPE_CHECKING, Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import agree
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.features import Feature, RunContext

if TYPE_CHECKING:
    from deepspeed_alst.offload.planner import OffloadPlanner


class ActivationOffload(Feature):
    """Activations of checkpointed layers that are kept or offloaded for the backward."""

    planner: "OffloadPlanner"

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Register with the layers' checkpoints; at SP 1, plan before each forward (under SP the batch check does)."""
        from deepspeed_alst.offload.planner import OffloadPlanner

        self.planner = OffloadPlanner(run.model, run.config, patches)
        if run.session is None:
            patches.hook(run.model, "forward_pre", self._plan, prepend=True, with_kwargs=True)

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Allocate the store off the device."""
        with agree(run.control_group):
            self.planner.attach(engine, patches)

    def report(self) -> list[tuple[str, str]]:
        """Return where activations are kept."""
        return self.planner.words()

    @torch.compiler.disable
    def _plan(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan a forward without sequence parallelism from each rank's own batch."""
        tokens = next((kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None), None)
        tokens = args[0] if tokens is None and args else tokens
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            raise UnsupportedModelError(
                f"alst.activation_checkpoint_cpu_offload, alst.save_attention_output: {type(module).__name__} was "
                "called without input_ids or inputs_embeds, so what will wait cannot be known. Set the keys to false."
            )
        self.planner.decide([self.planner.facts(tokens.shape[:2])])

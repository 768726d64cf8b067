"""Mixtures whose experts are modules of their own."""

from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.moe.mixtures import call_together


class SeparateExperts(Feature):
    """Have every rank gather and reduce all experts of a block."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the blocks of experts."""
        call_together(run.spec, run.stage, run.leaf, patches)

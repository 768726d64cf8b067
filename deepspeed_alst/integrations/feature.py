"""``alst.liger_kernel``: Liger's kernels."""

import sys

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.features import Feature, RunContext


class LigerKernels(Feature):
    """Liger's kernels in the model's modules."""

    makes_loss = False
    """True if a tiled loss with backend "auto" uses Liger's kernel."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the modules that Liger has kernels for."""
        loss = run.config.tiled_loss()
        is_wanted = run.config.alst.liger_kernel != "auto" or (loss is not None and loss.backend == "liger")
        if run.device != "cuda" and not is_wanted:
            self._words = f"not used: Liger's kernels need a GPU, and the engine is on {run.device}"
            return
        from deepspeed_alst.integrations.hf_liger import use_liger

        liger = use_liger(run.spec, run.config, run.device, run.control_group, patches)
        self.makes_loss, self._words = liger.makes_loss, liger.words

    def report(self) -> list[tuple[str, str]]:
        """Return which parts run by kernels."""
        return [("liger", self._words)]


class OwnLoss(Feature):
    """Loss of a model that the program has patched with Liger, made by its head."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Have such a model call its head and its loss function."""
        if "liger_kernel" in sys.modules:
            from deepspeed_alst.integrations.hf_liger import use_own_loss

            use_own_loss(run.spec, patches)

"""``alst.liger_kernel``: Liger's kernels, or this package's fused norms and rotary embedding."""

import sys

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.features import Feature, RunContext
from deepspeed_alst.kernels.registry import load_tile_ops


class LigerKernels(Feature):
    """Liger's kernels in the model's modules."""

    makes_loss = False
    """True if a tiled loss with backend "auto" uses Liger's kernel."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the modules that Liger has kernels for; on a GPU without Liger, fuse norms and rotary embedding."""
        from deepspeed_alst.integrations.liger import use_liger

        liger = use_liger(run.model, run.config, run.device, run.control_group, patches)
        self.makes_loss, self._rows = liger.makes_loss, [("liger", liger.words)]
        if _fuses(run, liger.patched):
            from deepspeed_alst.integrations.fused import fuse_norms_and_rope

            self._rows.append(("norms, rotary", fuse_norms_and_rope(run.model, patches)))

    def report(self) -> list[tuple[str, str]]:
        """Return which parts run by kernels."""
        return self._rows


class TileKernels(Feature):
    """Compiled ops for tiles, loaded outside of a step: a build takes up to a minute."""

    def __init__(self, makes_loss: bool) -> None:
        self._makes_loss = makes_loss

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Load the ops; have a model that Liger has patched make its loss by its head."""
        load_tile_ops(run.device)
        if self._makes_loss and "liger_kernel" in sys.modules:
            from deepspeed_alst.integrations.liger import use_own_loss

            use_own_loss(run.model, patches)


def _fuses(run: RunContext, is_patched: bool) -> bool:
    """Return True if this package's norms and rotary embedding are used: on a GPU, unless Liger is on or off."""
    return run.config.alst.liger_kernel == "auto" and not is_patched and run.device == "cuda"

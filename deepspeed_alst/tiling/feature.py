"""``alst.tiled_mlp_compute`` and ``alst.tiled_logits_loss``."""

from deepspeed_alst.config.schema import TiledLossConfig, TiledMLPConfig
from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.kernels import define_ops
from deepspeed_alst.liger.feature import LigerKernels


class TiledMlp(Feature):
    """MLPs and experts in tiles of tokens."""

    def __init__(self, budget: TiledMLPConfig) -> None:
        self._budget = budget

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch every token-wise module of the decoder layers."""
        from deepspeed_alst.tiling.tiled_mlp import tile_mlps

        define_ops("gated")
        self._summary = tile_mlps(run.spec, self._budget, run.leaf, patches, run.calls)

    def report(self) -> list[tuple[str, str]]:
        """Return the tiled modules and the size of a tile."""
        return [("tiled MLP", self._summary)]


class TiledLoss(Feature):
    """Logits and loss in tiles of tokens."""

    def __init__(self, budget: TiledLossConfig, liger: LigerKernels | None) -> None:
        self._budget, self._liger = budget, liger

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the head, and without sequence parallelism, which has its own loss, the loss."""
        from deepspeed_alst.tiling.tiled_loss import patch_unsharded_loss, tile_loss

        budget = self._budget
        if budget.backend == "auto" and self._liger is not None and self._liger.makes_loss:
            budget = budget.model_copy(update={"backend": "liger"})
        if budget.backend != "torch" and run.device == "cuda":
            define_ops("cross_entropy")
        self._summary = tile_loss(run.spec.with_head, budget, run.calls, run.leaf, patches)
        if run.session is None:
            patch_unsharded_loss(run.spec, patches)

    def report(self) -> list[tuple[str, str]]:
        """Return the head's class, the size of a tile and the kernel."""
        return [("tiled loss", self._summary)]

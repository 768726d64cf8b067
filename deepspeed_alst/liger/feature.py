"""``alst.liger_kernel``: Liger's kernels, and models that a program has patched with Liger."""

import functools
import inspect
from typing import Any

import torch

from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet

_SKIP_LOGITS = "skip_logits"


def is_from_liger(thing: Any) -> bool:
    """Return True if a function, a method, or an object's class comes from Liger."""
    return (getattr(thing, "__module__", None) or "").split(".")[0] == "liger_kernel"


class LigerKernels(Feature):
    """Liger's kernels in the model's modules."""

    makes_loss = False
    """True if a tiled loss with backend "auto" uses Liger's kernel."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the modules that Liger has kernels for."""
        loss, wanted = run.config.tiled_loss(), run.config.alst.liger_kernel
        if run.device != "cuda" and wanted == "auto" and (loss is None or loss.backend != "liger"):
            self._summary = f"not used: Liger's kernels need a GPU, and the engine is on {run.device}"
            return
        from deepspeed_alst.liger.hf_liger import use_liger

        liger = use_liger(run.spec, run.config, run.device, run.control_group, patches)
        self.makes_loss = liger.possible and getattr(wanted, "fused_linear_cross_entropy", None) is not False
        self._summary = liger.summary

    def report(self) -> list[tuple[str, str]]:
        """Return the parts in use, or the reason why none is."""
        return [("liger", self._summary)]


class OwnLoss(Feature):
    """Loss of a model that the program has patched with Liger, computed by its head and ``loss_function``.

    Liger's ``lce_forward`` calls them with ``skip_logits=False``: here the tiled head and the whole sequence's loss.
    """

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Have such a model call its head and its loss function."""
        before = run.spec.model.forward
        if not is_from_liger(before) or _SKIP_LOGITS not in inspect.signature(before).parameters:
            return

        # PEFT's wrapper calls forward directly, bypassing hooks. A method, so that a copy of the model binds its own.
        @functools.wraps(before.__func__)
        def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return before.__func__(self, *args, **{**kwargs, _SKIP_LOGITS: False})

        patches.forward(run.spec.model, forward)

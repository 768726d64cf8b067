"""Memory of a layer with Liger's kernels, on fake tensors: their functions allocate, and nothing is launched."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.tiles.shapes import REAL_SIZE, step_of
from benchmarks.tiles.systems import System
from deepspeed_alst.config.schema import AlstConfig, TiledMLPConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.integrations.hf_liger import use_liger_without_data

NORMS_AND_ROPE = {"swiglu": False}
"""``alst.liger_kernel``: RMSNorm and rotary embedding."""


class WithLiger(System):
    """Our tiles and Liger's kernels; ``liger`` is a value of ``alst.liger_kernel``."""

    def __init__(self, liger: Any) -> None:
        super().__init__("ours", "non-reentrant")
        self.keys = AlstConfig.model_validate({"alst": {"liger_kernel": liger}})

    @contextmanager
    def on(self, model: Any, sp_size: int = 1, mlp: TiledMLPConfig | None = None) -> Iterator[Any]:
        """Patch the model as in System, with Liger's kernels."""
        with PatchSet() as undo:
            use_liger_without_data(ModelSpec(model), self.keys, undo)
            with super().on(model, sp_size, mlp) as step:
                yield step


def layer_peak(model_type: str, liger: Any) -> float:
    """Return peak bytes per token of a model of one checkpointed layer, with tiled MLP and loss.

    Args:
        model_type: of ``benchmarks.tiles.shapes.REAL_SIZE``.
        liger: a value of ``alst.liger_kernel``.
    """
    shape = next(each for each in REAL_SIZE if each.model_type == model_type)
    ledger = step_of(dataclasses.replace(shape, num_layers=1), 1, WithLiger(liger)).ledger
    in_layer = [each for each in ledger.timeline if each.moment.module.startswith("model.layers.")]
    return max(each.total - each.bytes["weights"] for each in in_layer) / shape.tokens

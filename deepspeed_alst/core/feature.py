"""Interface of the features that keys of the ds_config turn on, and what one call of ``initialize`` gives them."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deepspeed.accelerator import get_accelerator

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet

if TYPE_CHECKING:
    from deepspeed_alst.config.schema import AlstConfig
    from deepspeed_alst.core.forward_context import ForwardContext
    from deepspeed_alst.sequence_parallel.session import Session
    from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves


@dataclass(frozen=True)
class RunContext:
    """One call of ``deepspeed.initialize``, before its engine exists."""

    spec: ModelSpec
    """The caller's model, patched by features before the engine is built."""
    config: "AlstConfig"
    stage: int
    """ZeRO stage."""
    control_group: Any
    """All ranks over gloo."""
    session: "Session | None"
    """Sequence parallelism; None at SP 1."""
    upstream: Any
    """DeepSpeed's own sequence-parallel mpu, if the program was written for its ALST; else None."""
    calls: "ForwardContext"
    leaf: "ZeRO3Leaves"
    device: str = field(default_factory=lambda: get_accelerator().device_name())
    """Kind of the device that the engine uses."""


class Feature:
    """A part of the package that keys of the ds_config turn on; the registry builds it if they do."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the model before its engine is built."""

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Patch the engine, or set its part in ``engine.alst_features``."""

    def report(self) -> list[tuple[str, str]]:
        """Return rows of the activation report: name and description."""
        return []

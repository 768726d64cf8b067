"""The interface of a feature, and what every feature is given."""

from dataclasses import dataclass
from typing import Any

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves


@dataclass(frozen=True)
class RunContext:
    """One call of ``deepspeed.initialize``, before its engine exists."""

    model: Any
    """The caller's, patched by features before the engine is built."""
    config: AlstConfig
    device: str
    """Kind of the device that the engine uses."""
    control_group: Any
    """All ranks over gloo."""
    session: Session | None
    """Sequence parallelism; None at SP 1."""
    upstream: Any
    """DeepSpeed's own sequence-parallel mpu, if the program was written for its ALST; else None."""
    calls: ForwardContext
    leaf: ZeRO3Leaves


class Feature:
    """A part of the package that keys of the ds_config turn on; the registry builds it if they do."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the model before its engine is built."""

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Patch the engine, or set its part in ``engine.alst_features``."""

    def report(self) -> list[tuple[str, str]]:
        """Return rows of the activation report: name and description."""
        return []

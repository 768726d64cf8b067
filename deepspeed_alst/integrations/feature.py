"""Programs that are written for DeepSpeed's own ALST."""

from typing import Any

from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.integrations.hf_upstream import UpstreamProgram, remove_upstream_attention
from deepspeed_alst.sequence_parallel.session import Session


class Upstream(Feature):
    """Redirect such a program to this package."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Remove DeepSpeed's attention."""
        remove_upstream_attention(patches)

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Redirect the program's loaders, loss and tiles."""
        engine.alst_features.upstream = UpstreamProgram(engine, self._session, run.upstream, patches)

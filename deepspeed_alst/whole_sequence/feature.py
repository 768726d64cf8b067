"""Classifiers, decoders without a head, and modules around a model."""

from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.whole_sequence.heads import split_calls


class WholeSequences(Feature):
    """Split the calls of a part of the model; the rest of it runs on whole batches."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the part's calls, and the modules around it."""
        split_calls(run.spec, self._session, patches)

"""Multimodal models under ``sequence_parallel_size``: encoders and merge on whole samples, the language model in shards.

Every rank of a sequence is given the whole sample. The model's own code makes the embeddings of all tokens and calls
its language model, where the ranks cut them (decoder_calls.py). Its output stands for that of the whole sequence
(whole_sequence/sequence_tensor.py), of which the head and the loss run on this rank's rows (head.py).
"""

from typing import Any

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.features import Feature, RunContext
from deepspeed_alst.multimodal.decoder_calls import split_decoder_calls
from deepspeed_alst.multimodal.head import split_head
from deepspeed_alst.sequence_parallel.feature import without_split
from deepspeed_alst.sequence_parallel.private_config import own_config


class Multimodal(Feature):
    """Split of a multimodal model's language model, head and loss."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the calls of the language model, of the head and of the loss."""
        session, whole = self._session, ModelSpec(run.spec.whole)
        self._name = whole.name
        _share_config(whole, run.spec.config, patches)
        split_decoder_calls(run.spec, session, patches)
        split_head(whole, session, patches)
        if hasattr(whole.model, "generate"):
            patches.wrap(whole.model, "generate", without_split(run.spec.config, session.calls))

    def report(self) -> list[tuple[str, str]]:
        """Return the row of the parts that see whole samples."""
        return [("multimodal", f"{self._name}: encoders and merge on each rank, cut at the language model")]


def _share_config(whole: ModelSpec, text_config: Any, patches: PatchSet) -> None:
    """Give a model the config of its patched language model, by which it makes masks."""
    config, before = whole.config, whole.text_config
    own = own_config(whole.outer, config, patches)
    for name in [name for name, value in vars(config).items() if value is before]:
        setattr(own, name, text_config)

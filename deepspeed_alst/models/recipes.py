"""What DeepSpeed's recipes leave in models and libraries, taken back or made right for an engine's life."""

import sys
from collections.abc import Callable
from typing import Any

from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepspeed_alst.core.patching import PatchSet

_UPSTREAM = "deepspeed.runtime.sequence_parallel.ulysses_sp"
_CHUNKED_LOSS = ("deepspeed.runtime.chunked_cross_entropy", "ChunkedCausalLMLoss")
_SKIP = "skip_first_batches"


def is_causal_lm_loss(function: Any) -> bool:
    """Whether a loss is that of transformers' causal models: its own, or DeepSpeed's of the same value.

    The latter is what ``install_chunked_causal_lm_loss`` puts into a model.
    """
    return function is ForCausalLMLoss or (type(function).__module__, type(function).__name__) == _CHUNKED_LOSS


def take_out_upstream_attention(patches: PatchSet) -> None:
    """Give every model its own attention core back, in whose place DeepSpeed has put its wrapper for all of them.

    The wrapper stands in the interface's local mapping, in front of the cores; ``patches.close()`` puts it there again.
    """
    in_front = ALL_ATTENTION_FUNCTIONS._local_mapping
    for name, function in list(in_front.items()):
        if getattr(function, "__module__", "") == _UPSTREAM:
            patches.remove_entry(in_front, name)


def skip_within_shards(adapter: type, rewrap: Callable[[Any, Any, int], Any], patches: PatchSet) -> None:
    """Make accelerate's ``skip_first_batches``, by which training is resumed within an epoch, keep an adapter.

    It makes a plain loader of whatever has a dataset, whose batches would reach the model whole. Replaced wherever it
    has been imported by its name.

    Args:
        adapter: the class of loaders that yield shards.
        rewrap: makes an adapter like a given one, over another inner loader and without its first ``n`` micro-batches.
        patches: takes the replacement back.
    """
    try:
        from accelerate.data_loader import skip_first_batches as original
    except ImportError:
        return

    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        if not isinstance(dataloader, adapter):
            return original(dataloader, num_batches)
        # What is counted are micro-batches, and each batch of the inner loader stands for one of every rank's.
        refills, rest = divmod(num_batches, dataloader.sp_world_size)
        return rewrap(dataloader, original(dataloader.dl, refills), rest)

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(_SKIP) is original:
            patches.set(module, _SKIP, skip_first_batches)

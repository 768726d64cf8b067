"""Undo or fix, for an engine's life, the patches that DeepSpeed's recipes leave in models and libraries."""

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
    """Return True if a loss is transformers' causal LM loss, or DeepSpeed's of the same value.

    ``install_chunked_causal_lm_loss`` puts the latter into a model.
    """
    return function is ForCausalLMLoss or (type(function).__module__, type(function).__name__) == _CHUNKED_LOSS


def take_out_upstream_attention(patches: PatchSet) -> None:
    """Remove DeepSpeed's attention wrapper, so that each model gets its own attention core back.

    The wrapper is in the interface's local mapping, which hides the cores; ``patches.close()`` puts it back.
    """
    in_front = ALL_ATTENTION_FUNCTIONS._local_mapping
    for name, function in list(in_front.items()):
        if getattr(function, "__module__", "") == _UPSTREAM:
            patches.remove_entry(in_front, name)


def skip_within_shards(adapter: type, rewrap: Callable[[Any, Any, int], Any], patches: PatchSet) -> None:
    """Make accelerate's ``skip_first_batches``, which resumes training within an epoch, keep an adapter.

    The original returns a plain loader for any loader with a dataset, whose batches would reach the model unsharded.
    The patch covers all modules that have imported it by name.

    Args:
        adapter: class of the loaders that yield shards.
        rewrap: returns an adapter like a given one, over another inner loader, without its first ``n`` micro-batches.
        patches: undo stack.
    """
    try:
        from accelerate.data_loader import skip_first_batches as original
    except ImportError:
        return

    def skip_first_batches(dataloader: Any, num_batches: int = 0) -> Any:
        if not isinstance(dataloader, adapter):
            return original(dataloader, num_batches)
        # num_batches counts micro-batches; one batch of the inner loader per rank gives sp_world_size of them.
        refills, rest = divmod(num_batches, dataloader.sp_world_size)
        return rewrap(dataloader, original(dataloader.dl, refills), rest)

    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(_SKIP) is original:
            patches.set(module, _SKIP, skip_first_batches)

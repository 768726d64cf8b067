"""Head and loss of a multimodal model on this rank's rows of the whole sequence.

Legend: B batch, S whole sequence, n rows of this rank, M model dim, V vocabulary.
"""

import sys
from typing import Any

import torch

from deepspeed_alst.core.hf_model_spec import ModelSpec, is_causal_lm_loss
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import pad_on_the_right
from deepspeed_alst.data.sharding import shift_labels as shifted
from deepspeed_alst.data.validation import LABEL_KEYS, as_int64
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL, shard_divisor, sum_over_shards
from deepspeed_alst.tiling.lazy_logits import LazyLogits, share_of_loss
from deepspeed_alst.whole_sequence.sequence_tensor import SequenceTensor
from deepspeed_alst.whole_sequence.token_rows import Recorded


def split_head(spec: ModelSpec, session: Any, patches: PatchSet) -> None:
    """Run a model's head on the rows of a SequenceTensor, ``[n, M] -> [n, V]``, and its loss on their logits."""
    module, model = spec.head, spec.model
    cls, original = type(module), model.loss_function

    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], SequenceTensor):
            return cls.__call__(self, *args, **kwargs)
        logits = cls.__call__(self, args[0].computed_rows())
        if not isinstance(logits, LazyLogits):
            return args[0].like(logits)
        model.alst_head.is_tiled = True
        found = SequenceTensor(Recorded.of_logits(logits), args[0].places)
        found.of_head = found.rows, logits
        return found

    @torch.compiler.disable
    def loss_function(
        logits: torch.Tensor,
        labels: torch.Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        rows = logits if isinstance(logits, LazyLogits) else _rows_of(logits)
        if rows is None or not is_causal_lm_loss(original) or ignore_index != IGNORED_LABEL:
            logits = logits.materialize() if isinstance(logits, LazyLogits) else logits
            return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        labels_BS = shifted(as_int64("labels", labels)) if shift_labels is None else shift_labels
        divisor = shard_divisor(labels_BS, num_items_in_batch)
        if rows is logits:  # an evaluation's, of this rank's own batch
            return share_of_loss(rows, labels_BS, divisor)
        places = logits.places
        present_n = places.of_rows >= 0
        labels_n = places.rows_of(labels_BS.to(present_n.device)).masked_fill(~present_n, IGNORED_LABEL)
        loss = sum_over_shards(share_of_loss(rows, labels_n, divisor), session.groups.sp_group)
        session.note_own_loss(loss)
        return loss

    @torch.compiler.disable
    def check_labels(_: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = {key: kwargs[key] for key in ("attention_mask", *LABEL_KEYS) if kwargs.get(key) is not None}
        if not session.calls.whole:
            pad_on_the_right(given)  # refuses labels that padding would have to predict

    patches.hook(spec.outer, "forward_pre", check_labels, with_kwargs=True)
    patches.subclass(module, {"__call__": torch.compiler.disable(call)})
    patches.set(model, "_loss_function", loss_function)


def split_fused_head(patches: PatchSet) -> None:
    """Have TRL's fused head score this rank's rows of a SequenceTensor, ``[n, M]``; nothing unless TRL is loaded.

    It is an autograd function, called with ``(hidden_states, weight, bias, labels, ...)`` of the scored tokens.
    """
    home = sys.modules.get("trl.trainer.utils")
    function = getattr(home, "_ChunkedLogProbFunction", None)
    if function is None:
        return

    class OwnRows:
        @staticmethod
        def apply(hidden: torch.Tensor, weight: Any, bias: Any, labels: torch.Tensor, *options: Any) -> Any:
            if not isinstance(hidden, SequenceTensor):
                return function.apply(hidden, weight, bias, labels, *options)
            labels_n, present_n = hidden.places.rows_of(labels), hidden.places.of_rows >= 0
            found = function.apply(hidden.computed_rows()[present_n], weight, bias, labels_n[present_n], *options)
            rows = (x if x is None else x.new_zeros(len(present_n)).masked_scatter(present_n, x) for x in found)
            return tuple(x if x is None else hidden.like(x) for x in rows)

    patches.set(home, "_ChunkedLogProbFunction", OwnRows)


def _rows_of(logits: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's logits of the whole sequence's, ``[n, V]``, lazy as the head's; None for others."""
    if not isinstance(logits, SequenceTensor):
        return None
    rows, lazy = logits.of_head or (None, None)
    return lazy if rows is logits.rows else logits.rows if isinstance(logits.rows, torch.Tensor) else None

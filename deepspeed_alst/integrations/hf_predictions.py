"""Evaluation of the HF Trainer on shards; each rank gets the predictions of its own batch.

Legend: B batch, S whole sequence, s = S/P one shard, P ranks of a sequence.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.data.sharding import tokens_of
from deepspeed_alst.distributed.collectives import raise_on_all_ranks
from deepspeed_alst.distributed.gather import MAX_BYTES, gather_predictions, is_too_large
from deepspeed_alst.errors import DataError, ShapeError
from deepspeed_alst.integrations.hf_trainer import (
    NUM_ITEMS,
    NUM_LABELS,
    check_trainer,
    exchange_batches,
    takes_whole_batches,
    whole_sequence_smoothing,
)
from deepspeed_alst.integrations.trl_losses import distil_logits
from deepspeed_alst.tiling.tiled_loss import logits_wanted
from deepspeed_alst.whole_sequence.batches import accept_whole_batches


@contextlib.contextmanager
def evaluation(trainer: Any) -> Iterator[None]:
    """Make ``Trainer.evaluation_loop`` predict on shards.

    ``preprocess_logits_for_metrics`` gets a shard's logits, before any rank holds those of a whole sequence. A
    prediction_step or compute_loss that the program overrides, as for generation, gets whole batches, which the engine
    shards for the loss.
    """
    predict, preprocess = trainer.prediction_step, trainer.preprocess_logits_for_metrics
    whole = takes_whole_batches(trainer, "prediction_step")

    @functools.wraps(predict)
    def prediction_step(model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        def predicted(batch: Any) -> tuple[Any, Any, Any]:
            loss, logits, labels = predict(model, batch, prediction_loss_only, ignore_keys=ignore_keys)
            return loss, logits if preprocess is None or logits is None else preprocess(logits, labels), labels

        session = getattr(trainer.model_wrapped, "alst", None)
        with logits_wanted(trainer.model, not prediction_loss_only):
            if session is None:
                return predicted(inputs)
            check_trainer(trainer)
            if not whole:
                return _predict_on_shards(trainer, session, predicted, inputs, prediction_loss_only)
            model = trainer.model_wrapped if model is trainer.model else model  # the engine, which shards
            session.meet("within an evaluation")
            with accept_whole_batches(session), PatchSet() as patches:
                distil_logits(trainer, patches)
                return predicted(inputs)

    with PatchSet() as patches:
        patches.set(trainer, "prediction_step", prediction_step)
        patches.set(trainer, "preprocess_logits_for_metrics", None)
        yield
        session = getattr(trainer.model_wrapped, "alst", None)
        if session is not None:
            session.meet("at the end of an evaluation")


def _predict_on_shards(
    trainer: Any, session: Any, predicted: Callable[[Any], tuple[Any, Any, Any]], inputs: Any, loss_only: bool
) -> tuple[Any, Any, Any]:
    session.meet("within an evaluation")  # before the count, which is a collective too
    inputs = trainer._prepare_inputs(inputs)
    length, groups = tokens_of(inputs).shape[1], session.groups
    # Counted over all ranks' own batches, as at SP 1.
    extras = {NUM_ITEMS: trainer._get_num_items_in_batch([inputs], trainer.args.device)}
    losses, pieces = [], []
    for shard, counts in exchange_batches(session, inputs, extras):
        with (
            session.calls.having(makes_whole_loss=True),
            _counted_items(trainer, counts),
            whole_sequence_smoothing(trainer, session, shard),
        ):
            loss, logits, _ = predicted(shard)
        losses.append(loss)
        if not loss_only:
            pieces.append(logits)
            # Before other shards are predicted.
            raise_on_all_ranks(_problem(logits, tokens_of(shard).shape[1], groups.sp_size), groups.control_group)
    if loss_only:
        return losses[groups.sp_rank], None, None
    # As Trainer.prediction_step returns the labels.
    labels = tuple(inputs.get(name) for name in trainer.label_names)
    labels = None if not labels or any(each is None for each in labels) else labels
    labels = labels[0] if labels is not None and len(labels) == 1 else labels
    return losses[groups.sp_rank], gather_predictions(pieces, length, groups), labels


@contextlib.contextmanager
def _counted_items(trainer: Any, counts: dict[str, Any]) -> Iterator[None]:
    """Make the Trainer use the owner's item count of an evaluation batch, not the shard's.

    A subclass may divide by its own count where ``compute_loss`` gets none (TRL's SFTTrainer does), so it always gets
    one. The other effects of a given count (a factor of the number of ranks, a router loss divided by the accumulation
    steps) are for training only and are turned off.
    """
    compute_loss = trainer.compute_loss
    num_labels = counts[NUM_LABELS]

    @functools.wraps(compute_loss)
    def counted(*args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if num_items_in_batch is not None or num_labels is None:
            return compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        with PatchSet() as patches:
            patches.set(trainer.args, "average_tokens_across_devices", False)
            patches.set(trainer, "current_gradient_accumulation_steps", 1)
            return compute_loss(*args, num_items_in_batch=num_labels, **kwargs)

    with PatchSet() as patches:
        patches.set(trainer, "_get_num_items_in_batch", lambda *args, **kwargs: counts[NUM_ITEMS])
        patches.set(trainer, "compute_loss", counted)
        yield


def _problem(piece: Any, shard_length: int, sp_size: int) -> DataError | ShapeError | None:
    if isinstance(piece, tuple | list):
        return next((problem for each in piece if (problem := _problem(each, shard_length, sp_size))), None)
    if not isinstance(piece, torch.Tensor) or piece.dim() < 2 or piece.shape[1] != shard_length:
        shown = list(piece.shape) if isinstance(piece, torch.Tensor) else type(piece).__name__
        return ShapeError(
            f"evaluation: predictions on a shard must be [batch, {shard_length} tokens, ...] tensors, not {shown}. "
            "preprocess_logits_for_metrics is called with a shard's logits and must keep the dim of tokens."
        )
    if is_too_large(piece, sp_size):
        num_bytes = piece.numel() * piece.element_size() * sp_size
        return DataError(
            f"evaluation: the predictions of one batch would be {num_bytes / 2**30:.1f} GiB on a rank (shape "
            f"{list(piece.shape)} on a shard, {sp_size} shards), more than {MAX_BYTES / 2**30:.0f} GiB. Give the "
            "Trainer preprocess_logits_for_metrics (for example an argmax), or prediction_loss_only=True."
        )
    return None

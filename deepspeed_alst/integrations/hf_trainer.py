"""HF Trainer under sequence parallelism: its schedule stays the same, and each of its batches becomes P micro-steps.

The Trainer draws a batch for every rank, as at SP 1, so all its counts stay the same: steps, epochs, batch sizes,
tokens, the learning-rate schedule, the samples seen before a checkpoint. Where it passes a batch to the model, the P
ranks of a sequence exchange their batches and process them in turn.

Legend: B batch, S whole sequence, s = S/P one shard, P ranks of a sequence, N ranks in all.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL, whole_sequence_divisor, whole_sequence_loss
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.integrations.hf_predictions import check_predictions, gather_predictions
from deepspeed_alst.tiling.lazy_logits import share_of_loss
from deepspeed_alst.tiling.tiled_loss import logits_for_loss, logits_wanted

# Keys sent along with a batch besides the model's own arguments.
_NUM_ITEMS = "alst_num_items"
_NUM_LABELS = "alst_num_labels"


def training_step(
    original: Callable[..., torch.Tensor],
    trainer: Any,
    model: Any,
    inputs: dict[str, Any],
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Run ``Trainer.training_step`` as P micro-steps; return the loss of this rank's own batch, as at SP 1.

    Raises:
        ConfigError: an argument of the Trainer cannot work on shards.
    """
    session = model.alst
    check_trainer(trainer)
    gradient_state = trainer.accelerator.gradient_state
    last_of_step = gradient_state.sync_gradients
    batches = getattr(trainer, "current_gradient_accumulation_steps", "?")
    progress = (
        f"in training of {trainer.state.max_steps} steps, {batches} batches for a step"
        f"{', the last of its data' * gradient_state.end_of_dataloader}"
    )
    whole = _has_own(trainer, "compute_loss", "_prepare_inputs")
    micro_steps = _exchange(session, inputs, {_NUM_ITEMS: num_items_in_batch}, progress, whole)
    losses = []
    for place, (batch, extras) in enumerate(micro_steps):
        # Only the last micro-step reduces gradients and steps the weights.
        gradient_state._set_sync_gradients(last_of_step and place == len(micro_steps) - 1)
        # A program's own compute_loss gets the whole batch, as at SP 1, and the engine shards it.
        splitting = session.whole_batches() if whole else contextlib.nullcontext()
        with session.averaged_over_micro_steps(), _loss_of_whole_sequence(trainer, session, batch, whole), splitting:
            losses.append(original(trainer, model, batch, extras[_NUM_ITEMS]))
    return losses[session.groups.sp_rank]


def _has_own(trainer: Any, *names: str) -> bool:
    """Return True if one of a Trainer's methods is the program's; transformers' and TRL's work on shards."""
    homes = (getattr(getattr(trainer, name), "__module__", None) or "" for name in names)
    return any(home != "transformers.trainer" and not home.startswith("trl.") for home in homes)


@contextlib.contextmanager
def evaluation(trainer: Any) -> Iterator[None]:
    """Make ``Trainer.evaluation_loop`` predict on shards.

    ``preprocess_logits_for_metrics`` gets a shard's logits, before any rank holds those of a whole sequence. A
    prediction_step or compute_loss of the program's own, and evaluation by generation, gets whole batches, which the
    engine shards where it computes the loss.
    """
    predict, preprocess = trainer.prediction_step, trainer.preprocess_logits_for_metrics
    whole = _has_own(trainer, "prediction_step", "compute_loss", "_prepare_inputs")

    @functools.wraps(predict)
    def prediction_step(model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        session = getattr(trainer.model_wrapped, "alst", None)
        if session is not None:
            check_trainer(trainer)
        splitting = session.whole_batches() if session is not None and whole else contextlib.nullcontext()
        with logits_wanted(trainer.model, not prediction_loss_only), splitting:
            if session is None or whole:
                if whole and session is not None and model is trainer.model:
                    model = trainer.model_wrapped  # the engine, which shards
                loss, logits, labels = predict(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
                return loss, logits if preprocess is None or logits is None else preprocess(logits, labels), labels
            return _prediction_step(
                predict, preprocess, trainer, session, model, inputs, prediction_loss_only, ignore_keys
            )

    with PatchSet() as patches:
        patches.set(trainer, "prediction_step", prediction_step)
        patches.set(trainer, "preprocess_logits_for_metrics", None)
        yield
        session = getattr(trainer.model_wrapped, "alst", None)
        if session is not None:
            session.meet("at the end of an evaluation")


def check_trainer(trainer: Any) -> None:
    """Raise if the Trainer's arguments cannot work on shards.

    Raises:
        ConfigError: one line per argument, with its value, the reason and the fix.
    """
    args = trainer.args
    problems = []
    if trainer.compute_loss_func is not None:
        problems.append(
            "compute_loss_func: it would make the loss of a shard out of a shard's logits; use the model's own loss, "
            "or override Trainer.compute_loss and change outputs.loss, which is the whole sequence's"
        )
    kind = next((each.__name__ for each in type(trainer).__mro__ if each.__module__.startswith("trl.")), "_BaseTrainer")
    if kind not in ("SFTTrainer", "_BaseTrainer"):
        problems.append(
            f"{kind}: losses of preference and reinforcement learning, rewards and distillation are made of each "
            "sequence's log-probabilities, of which a rank has a shard's: not available with sequence_parallel_size > "
            "1. Leave the key out, or use SFTTrainer"
        )
    elif getattr(args, "loss_type", "nll") not in (None, "nll"):
        problems.append(f"loss_type={args.loss_type!r}: it is made of a shard's log-probabilities; use 'nll'")
    if args.neftune_noise_alpha:
        problems.append(
            f"neftune_noise_alpha={args.neftune_noise_alpha}: its noise is scaled by the sequence's length, of which a "
            "rank sees its shard only; leave it out"
        )
    if args.auto_find_batch_size:
        problems.append("auto_find_batch_size=True: ranks could choose different sizes; set the batch size")
    if not args.accelerator_config.even_batches:
        problems.append(
            "accelerator_config.even_batches=False: a rank that runs out of batches early would leave the others "
            "waiting; leave it True"
        )
    if problems:
        raise ConfigError("\n".join(f"HF Trainer: {problem}." for problem in problems))


def _prediction_step(
    predict: Callable[..., Any],
    preprocess: Callable[..., Any] | None,
    trainer: Any,
    session: Any,
    model: Any,
    inputs: Any,
    prediction_loss_only: bool,
    ignore_keys: Any,
) -> tuple[Any, Any, Any]:
    session.meet("within an evaluation")  # before the count, which is a collective too
    inputs = trainer._prepare_inputs(inputs)
    # Counted over all ranks' own batches, as at SP 1.
    extras = {_NUM_ITEMS: trainer._get_num_items_in_batch([inputs], trainer.args.device)}
    own_loss, pieces = None, []
    for place, (shard, counts) in enumerate(_exchange(session, inputs, extras)):
        with (
            session.calls.having(makes_whole_loss=True),
            _counted_items(trainer, counts),
            _loss_of_whole_sequence(trainer, session, shard),
        ):
            loss, logits, labels = predict(model, shard, prediction_loss_only, ignore_keys=ignore_keys)
        if not prediction_loss_only:
            pieces.append(logits if preprocess is None else preprocess(logits, labels))
            check_predictions(pieces[-1], _length(shard), session.groups)
        if place == session.groups.sp_rank:
            own_loss = loss
    if prediction_loss_only:
        return own_loss, None, None
    logits = gather_predictions(pieces, _length(inputs), session.groups)
    return own_loss, logits, _own_labels(trainer, inputs)


def _length(batch: Any) -> int:
    return next(batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None).shape[1]


def _own_labels(trainer: Any, inputs: Any) -> Any:
    """Return the labels of this rank's whole batch, as ``Trainer.prediction_step`` does."""
    labels = tuple(inputs.get(name) for name in trainer.label_names)
    if not labels or any(label is None for label in labels):
        return None
    return labels[0] if len(labels) == 1 else labels


def _exchange(
    session: Any, inputs: Any, extras: dict[str, Any], progress: str = "", whole: bool = False
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return P pairs: this rank's shard of each rank's batch, or the batch, and its owner's counts."""
    labels = inputs.get("labels")
    if labels is not None:
        # A row's first token has no prediction.
        extras = {**extras, _NUM_LABELS: labels[:, 1:].ne(IGNORED_LABEL).sum()}
    pairs = []
    for shard in session.exchange({**inputs, **extras}, progress, whole):
        counts = {name: shard.pop(name, None) for name in (_NUM_ITEMS, _NUM_LABELS)}
        pairs.append((shard, counts))
    return pairs


@contextlib.contextmanager
def _loss_of_whole_sequence(trainer: Any, session: Any, batch: dict[str, Any], whole: bool = False) -> Iterator[None]:
    """Compute the Trainer's label-smoothing loss, made of logits after the forward, over the whole sequence."""
    smoother = trainer.label_smoother
    if smoother is None or "labels" not in batch:
        yield
        return
    shard = session.cut(batch) if whole else batch
    trainer.label_smoother = _LabelSmoother(smoother.epsilon, shard["shift_labels"], session, trainer.model)
    session.calls.loss_follows = True
    try:
        yield
    finally:
        trainer.label_smoother = smoother
        session.calls.loss_follows = False


class _LabelSmoother:
    """Replacement of transformers' LabelSmoother that uses labels shifted before sharding."""

    def __init__(self, epsilon: float, shift_labels_Bs: torch.Tensor, session: Any, model: torch.nn.Module) -> None:
        self.epsilon, self._shift_labels_Bs, self._session, self._model = epsilon, shift_labels_Bs, session, model

    def __call__(
        self, model_output: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits = logits_for_loss(self._model, model_output)
        group = self._session.groups.sp_group
        divisor = whole_sequence_divisor(self._shift_labels_Bs, group, num_items_in_batch)
        loss = whole_sequence_loss(share_of_loss(logits, self._shift_labels_Bs, divisor, self.epsilon), group)
        self._session.calls.note_loss(loss)
        return loss


@contextlib.contextmanager
def _counted_items(trainer: Any, counts: dict[str, Any]) -> Iterator[None]:
    """Make the Trainer use the owner's item count of an evaluation batch, not the shard's.

    A subclass may divide by its own count where ``compute_loss`` gets none (TRL's SFTTrainer does), so it always gets
    one. The other effects of a given count (a factor of the number of ranks, a router loss divided by the accumulation
    steps) are for training only and are turned off.
    """
    compute_loss = trainer.compute_loss
    num_labels = counts[_NUM_LABELS]

    @functools.wraps(compute_loss)
    def counted(*args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        if num_items_in_batch is not None or num_labels is None:
            return compute_loss(*args, num_items_in_batch=num_items_in_batch, **kwargs)
        with PatchSet() as patches:
            patches.set(trainer.args, "average_tokens_across_devices", False)
            patches.set(trainer, "current_gradient_accumulation_steps", 1)
            return compute_loss(*args, num_items_in_batch=num_labels, **kwargs)

    with PatchSet() as patches:
        patches.set(trainer, "_get_num_items_in_batch", lambda *args, **kwargs: counts[_NUM_ITEMS])
        patches.set(trainer, "compute_loss", counted)
        yield

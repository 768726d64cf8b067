"""HF Trainer under sequence parallelism: its schedule stays the same, and each of its batches becomes P micro-steps.

The Trainer draws a batch for every rank, as at SP 1, so all its counts stay the same: steps, epochs, batch sizes,
tokens, the learning-rate schedule, the samples seen before a checkpoint. Where it passes a batch to the model, the P
ranks of a sequence exchange their batches and process them in turn. Legend: B batch, s = S/P one shard.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deepspeed_alst.config.compatibility import GAS, MICRO, TOTAL, check_batch_keys
from deepspeed_alst.config.schema import parse
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL, sum_over_shards, whole_sequence_divisor
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.integrations.trl_losses import MicroSteps, distil_logits, makes_own_loss, refusals
from deepspeed_alst.tiling.lazy_logits import share_of_loss
from deepspeed_alst.tiling.tiled_loss import logits_for_loss
from deepspeed_alst.whole_sequence.batches import accept_whole_batches

# Keys sent along with a batch besides the model's own arguments.
NUM_ITEMS = "alst_num_items"
NUM_LABELS = "alst_num_labels"
_PLANNED = "alst_micro_steps"


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
    whole, losses, P = takes_whole_batches(trainer), [], session.groups.sp_size
    steps = MicroSteps(trainer, session.groups.sp_rank, P) if makes_own_loss(trainer) else None
    with accept_whole_batches(session) if whole else contextlib.nullcontext(), PatchSet() as patches:
        distil_logits(trainer, patches)
        inputs = steps.prepare(inputs, patches) if steps else inputs
        batches = exchange_batches(session, inputs, {NUM_ITEMS: num_items_in_batch}, progress, whole)
        if steps:
            step = functools.partial(original, trainer, model)
            steps.look_ahead(step, [batch for batch, _ in batches], session.groups.control_group)
        for place, (batch, extras) in enumerate(batches):
            # Only the last micro-step reduces gradients and steps the weights.
            gradient_state._set_sync_gradients(last_of_step and place == P - 1)
            # A program's own compute_loss gets the whole batch, as at SP 1, and the engine shards it.
            smoothing = whole_sequence_smoothing(trainer, session, batch, whole)
            with (
                session.averaged_over_micro_steps(),
                smoothing,
                steps.step(place) if steps else contextlib.nullcontext(),
            ):
                losses.append(original(trainer, model, batch, extras[NUM_ITEMS]))
    return losses[session.groups.sp_rank]


def overrides(trainer: Any, *names: str) -> bool:
    """Return True if the program overrides a Trainer's method; transformers' and TRL's work on shards."""
    homes = (getattr(getattr(trainer, name), "__module__", None) or "" for name in names)
    return any(home != "transformers.trainer" and not home.startswith("trl.") for home in homes)


def takes_whole_batches(trainer: Any, *methods: str) -> bool:
    """Return True for a loss that is not the model's own: the engine splits its batches, and gathers what it reads."""
    own = makes_own_loss(trainer) or trainer.compute_loss_func is not None
    own |= getattr(getattr(trainer.model_wrapped, "alst", None), "splits_decoder", False)
    return own or overrides(trainer, "compute_loss", "_prepare_inputs", *methods)


def check_trainer(trainer: Any) -> None:
    """Raise if the Trainer's arguments cannot work on shards.

    Raises:
        ConfigError: one line per argument, with its value, the reason and the fix.
    """
    args = trainer.args
    session = getattr(trainer.model_wrapped, "alst", None)
    problems = refusals(trainer, getattr(session, "is_multimodal", False))
    if args.neftune_noise_alpha:
        problems.append(
            f"neftune_noise_alpha={args.neftune_noise_alpha}: its noise is scaled by the sequence's length, and a rank "
            "has only a shard. Leave it out"
        )
    if args.label_smoothing_factor and getattr(session, "splits_decoder", False):
        problems.append(
            f"label_smoothing_factor={args.label_smoothing_factor}: of a model around a language model the Trainer "
            "smooths labels that are not shifted, which is not supported. Leave it out"
        )
    if args.auto_find_batch_size:
        problems.append("auto_find_batch_size=True: ranks could choose different sizes. Set the batch size")
    if not args.accelerator_config.even_batches:
        problems.append(
            "accelerator_config.even_batches=False: ranks would wait for one that runs out of batches early. Leave it "
            "True"
        )
    if problems:
        raise ConfigError("\n".join(f"HF Trainer: {problem}." for problem in problems))


def exchange_batches(
    session: Any, inputs: Any, extras: dict[str, Any], progress: str = "", whole: bool = False
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return P pairs: this rank's shard of each rank's batch (or the batch, if ``whole``) and that rank's counts."""
    labels = inputs.get("labels")
    if labels is not None and labels.dim() == 2:
        # A row's first token has no prediction.
        extras = {**extras, NUM_LABELS: labels[:, 1:].ne(IGNORED_LABEL).sum()}
    pairs = []
    for shard in session.exchange({**inputs, **extras}, progress, whole):
        counts = {name: shard.pop(name, None) for name in (NUM_ITEMS, NUM_LABELS)}
        pairs.append((shard, counts))
    return pairs


@contextlib.contextmanager
def whole_sequence_smoothing(trainer: Any, session: Any, batch: dict[str, Any], whole: bool = False) -> Iterator[None]:
    """Compute the Trainer's label-smoothing loss from logits after the forward, over the whole sequence."""
    smoother = trainer.label_smoother
    if smoother is None or "labels" not in batch:
        yield
        return
    labels_Bs, group = (session.cut(batch) if whole else batch)["shift_labels"], session.groups.sp_group

    def smoothed(output: Any, labels: Any, shift_labels: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        divisor = whole_sequence_divisor(labels_Bs, group, num_items_in_batch)
        share = share_of_loss(logits_for_loss(output), labels_Bs, divisor, smoother.epsilon)
        loss = sum_over_shards(share, group)
        session.calls.note_loss(loss)
        return loss

    with PatchSet() as patches, session.calls.having(loss_follows=True):
        patches.set(trainer, "label_smoother", smoothed)
        yield


def fill_batch_keys(original: Callable[..., None], hf_config: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
    """Run ``HfTrainerDeepSpeedConfig.trainer_config_process``, before an engine exists, with P ranks to a sequence.

    The Trainer's ``gradient_accumulation_steps`` counts batches of every rank, DeepSpeed's counts micro-steps, P per
    batch. So "auto" becomes the Trainer's number times P, and the total batch size stays as at SP 1. A number in the
    JSON means micro-steps, as in a plain loop; the Trainer's own may be the same, or P times smaller. Repeated calls
    with the same arguments, as by accelerate and the Trainer, are allowed.

    Raises:
        ConfigError: the number of micro-steps is not a multiple of P, or a key of this package is wrong.
    """
    P = parse(hf_config.config).sequence_parallel_size
    config = hf_config.config
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size != ranks:
        raise ConfigError(
            f"HF Trainer: WORLD_SIZE={ranks}, but the Trainer's world size is {args.world_size}: without a GPU, "
            "accelerate needs use_cpu to use several ranks. Add --use_cpu (TrainingArguments(use_cpu=True))."
        )
    given, micro = config.get(GAS, "auto"), config.get(MICRO, "auto")
    if type(given) is int and type(config.get(TOTAL)) is int:
        micro = args.per_device_train_batch_size if micro == "auto" else micro
        check_batch_keys({TOTAL: config[TOTAL], MICRO: micro, GAS: given}, P, ranks)
    if type(given) is int and given in (getattr(args, _PLANNED, None), args.gradient_accumulation_steps * P):
        config[GAS] = given // P
    elif type(given) is int and given == args.gradient_accumulation_steps:
        if given % P:
            raise ConfigError(
                f"{GAS}={given}: the HF Trainer draws a batch for every rank at a time, which makes "
                f'sequence_parallel_size={P} micro-steps. Use a multiple of {P}, or "auto", which keeps the total '
                "batch size as at SP 1."
            )
        args.gradient_accumulation_steps = config[GAS] = given // P
    original(hf_config, args, *rest, **kwargs)
    if config.get(GAS, args.gradient_accumulation_steps) == args.gradient_accumulation_steps:
        micro_steps = args.gradient_accumulation_steps * P
        config[GAS] = micro_steps
        PatchSet().set(args, _PLANNED, micro_steps)

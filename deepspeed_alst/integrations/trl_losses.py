"""TRL's trainers, which make their loss and what they log of each token's numbers.

These are log-probabilities and entropies, which TRL's fused head gives for whole sequences here (trl_fused_head.py).
P ranks take one's batch at a time, so what is gathered over all ranks for the log is gathered in the last of P turns.
Legend: B batch, K tokens, V vocabulary.
"""

import contextlib
import functools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import gather_objects
from deepspeed_alst.distributed.sequence_loss import IGNORED_LABEL
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.tiling.lazy_logits import is_in

_LOSSES = ("compute_loss", "_compute_loss", "_compute_kl_logps")
_LIBRARIES = ("trl.", "transformers.", "deepspeed_alst.")
TRAINERS = (
    *("DPOTrainer", "DistillationTrainer", "GKDTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer"),
    "RewardTrainer",
)
_PLAIN = ("", "_BaseTrainer", "SFTTrainer")
_OF_IMAGES = ("DPOTrainer", *_PLAIN)
# Of KTO's batch, what its KL is not made of; cut to two tokens while only the KL is wanted.
_NOT_OF_KL = ("input_ids", "attention_mask", "completion_mask")


def _kind(trainer: Any) -> str:
    """Return the name of TRL's class of a trainer; empty if it is none."""
    return next((each.__name__ for each in type(trainer).__mro__ if each.__module__.startswith("trl.")), "")


def _overridden(trainer: Any) -> list[str]:
    """Return the methods of a trainer's loss that the program overrides."""
    return [name for name in _LOSSES if not getattr(trainer, name, _kind).__module__.startswith(_LIBRARIES)]


def makes_own_loss(trainer: Any) -> bool:
    """Return True for a trainer of TRL that makes its loss, or what it logs, of each token's numbers."""
    kind = _kind(trainer)
    if kind == "SFTTrainer":
        return trainer.args.loss_type not in (None, "nll") or not _overridden(trainer)
    return kind in TRAINERS


def refusals(trainer: Any, is_multimodal: bool = False) -> list[str]:
    """Return why a trainer of TRL, or its arguments, cannot work on shards."""
    kind = _kind(trainer)
    if is_multimodal and kind not in _OF_IMAGES:
        return [
            f"{kind}: not verified with models of images or audio. Use SFTTrainer, DPOTrainer, transformers' Trainer, "
            "or leave sequence_parallel_size out"
        ]
    if kind not in (*_PLAIN, *TRAINERS):
        return [
            f"{kind}: it needs outputs of whole sequences other than log-probabilities, and a rank has those of a "
            f"shard. Leave sequence_parallel_size out, or use one of {', '.join(['SFTTrainer', *TRAINERS])}"
        ]
    own = _overridden(trainer)
    if own and makes_own_loss(trainer):
        return [
            f"{', '.join(own)}, overridden in {type(trainer).__name__}: it runs once for each batch of {kind}'s ranks, "
            "and what it gathers or counts would not be that of SP 1. Leave sequence_parallel_size out, or write the "
            "loss with deepspeed_alst.log_probs in a loop of your own"
        ]
    return []


class _Gathers(BaseException):
    """Ends a trainer's step where it first gathers over the ranks; ``site`` is the line, ``mine`` what it gathers."""

    def __init__(self, mine: torch.Tensor) -> None:
        self.site, self.mine = _calling_line(), mine.detach()


class MicroSteps:
    """The P micro-steps of one training step, which log what one step at SP 1 does."""

    def __init__(self, trainer: Any, own: int, number: int) -> None:
        """``own`` is the micro-step of this rank's own batch, of ``number``."""
        self._trainer, self._own, self._last = trainer, own, number - 1
        self._values: dict[Any, torch.Tensor] = {}
        self._ahead: dict[Any, torch.Tensor] = {}
        self._known: dict[int, list[torch.Tensor]] = {}

    def prepare(self, inputs: Any, patches: PatchSet) -> Any:
        """Return this rank's own batch, with completions and rewards if the trainer makes them."""
        trainer = self._trainer
        if trainer._prepare_inputs.__module__ == "transformers.trainer":
            return inputs
        trainer.model_wrapped.train()  # as the step that was wrapped does before it
        made = trainer._prepare_inputs(inputs)
        patches.set(trainer, "_prepare_inputs", lambda batch: send_to_device(batch, trainer.args.device))
        return made

    def look_ahead(self, run: Callable[[Any], Any], batches: list[Any], group: Any) -> None:
        """Gather what the loss of every batch needs of the batches of all ranks: KTO's KL, GRPO's entropies.

        ``run`` is the trainer's step, which runs on each batch without a gradient up to where it gathers.
        """
        trainer = self._trainer
        is_kto = getattr(trainer, "calculate_KL", False)
        if not is_kto and getattr(trainer, "top_entropy_quantile", 1.0) == 1.0:
            return
        for place, batch in enumerate(batches):
            if is_kto:
                batch = {key: x[:, :2] if key in _NOT_OF_KL else x for key, x in batch.items()}
            with torch.no_grad(), PatchSet() as patches:
                patches.set(trainer.accelerator, "pad_across_processes", lambda x, **_: x)
                patches.set(trainer.accelerator, "gather", _stop)
                self._keep(place, patches)
                try:
                    run(batch)
                except _Gathers as reached:
                    if place == self._own:
                        own = reached
        everyone = gather_objects(own.mine.reshape(-1).cpu(), group)
        self._ahead = {own.site: torch.cat(everyone).to(own.mine.device)}

    def _keep(self, place: int, patches: PatchSet) -> None:
        """Keep, or use if they are kept, the KL's log-probabilities and the entropies of a batch.

        Those of the step itself, which has a gradient, may differ in the last bit, and the quantile is one of them.
        """
        trainer, use = self._trainer, place in self._known
        known = self._known.setdefault(place, [])

        def kl_log_probs(original: Callable[..., Any], *args: Any) -> Any:
            if not use:
                known.append(original(*args))
            return known.pop(0) if use else known[-1]

        def mask(original: Callable[..., Any], entropies: torch.Tensor, *args: Any) -> torch.Tensor:
            if not use:
                known.append(entropies.detach())
            return original(known[0], *args)

        for name, function in (("_compute_kl_logps", kl_log_probs), ("get_high_entropy_mask", mask)):
            if hasattr(trainer, name):
                patches.set(trainer, name, functools.partial(function, getattr(trainer, name)))

    @contextlib.contextmanager
    def step(self, place: int) -> Iterator[None]:
        """Gather metrics of each rank's own batch in the last micro-step, and drop those of the others."""
        trainer, metrics = self._trainer, self._trainer._metrics["train"]
        before, tokens = {key: list(values) for key, values in metrics.items()}, trainer._total_train_tokens
        calls: Counter[Any] = Counter()

        def of_own_batch(x: torch.Tensor) -> torch.Tensor:
            site = _calling_line()
            calls[site] += 1
            key = (site, calls[site])
            if place == self._own:
                self._values[key] = x.detach()
            if x is getattr(trainer, "_entropy_window_stats", None):
                return x  # sums over all batches of the sequence, the same on its ranks; their quotient is SP 1's
            if place == self._last and key not in self._values:
                raise UnsupportedModelError(
                    f"{type(trainer).__name__} gathers over ranks at {site[0]}:{site[1]} in one of its batches only, "
                    "which is not supported under sequence parallelism"
                )
            return self._values.get(key, x)

        def gather(original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
            if (ahead := self._ahead.get(_calling_line())) is not None:
                return ahead
            own = of_own_batch(x)
            if place == self._last:
                return original(own)
            # Ones, for what is counted: what a trainer gathers next depends on whether there is any.
            rows = x.shape[0] if x.dim() else 1
            return x.new_ones((rows * trainer.accelerator.num_processes, *x.shape[1:]))

        def reduce(original: Callable[..., Any], x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            own = of_own_batch(x)
            return original(own, *args, **kwargs) if place == self._last else torch.ones_like(x)

        with PatchSet() as patches:
            if self._ahead:
                patches.set(trainer.accelerator, "pad_across_processes", lambda x, **_: x)
                self._keep(place, patches)
            for function in (gather, reduce):
                original = getattr(trainer.accelerator, function.__name__)
                patches.set(trainer.accelerator, function.__name__, functools.partial(function, original))
            yield
        if place != self._last:
            metrics.clear()
            metrics.update(before)
            trainer._total_train_tokens = tokens


def _stop(x: torch.Tensor) -> None:
    raise _Gathers(x)


def _calling_line() -> tuple[str, int]:
    """Return file and line of the trainer's code that gathers: the first outside of this module and accelerate."""
    frame = sys._getframe(1)
    while is_in(frame, __name__, "accelerate"):
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


# --- distillation: the trainers' own losses read bodies and heads past the engines, or stack the logits of both models


def distil_logits(trainer: Any, patches: PatchSet) -> None:
    """Have a trainer that distils make its loss of the engines' logits; nothing for other trainers."""
    if hasattr(trainer, "_forward_redirection"):
        patches.set(trainer, "_forward_redirection", lambda student, *rest: _of_completions(trainer, student, *rest))
    if hasattr(trainer, "generalized_jsd_loss"):
        patches.set(trainer, "generalized_jsd_loss", _of_labels)


def _of_completions(trainer: Any, student: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return loss, sum of entropies, and number of tokens, as ``DistillationTrainer._compute_loss``."""
    *_, inputs, num_items = rest
    K = inputs["completion_ids"].shape[1]
    mask_BK = inputs["completion_mask"] * inputs.get("tool_mask", 1) != 0
    batch = {
        "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        "use_cache": False,
    }
    own_BKV = _log_probs(student(**batch).logits[:, -K - 1 : -1], trainer.temperature)
    trainer.teacher_model.eval()
    with torch.no_grad():
        teacher_BKV = _log_probs(trainer.teacher_model(**batch).logits[:, -K - 1 : -1], trainer.temperature)
        entropy_BK = -(own_BKV.exp() * own_BKV).sum(-1)
    loss = _mean(_divergence(own_BKV, teacher_BKV, trainer.beta), mask_BK, num_items)
    return loss, entropy_BK.masked_fill(~mask_BK, 0).sum(), mask_BK.sum()


def _of_labels(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    labels: torch.Tensor,
    beta: float,
    num_items_in_batch: Any,
) -> torch.Tensor:
    """Return the loss of ``GKDTrainer.generalized_jsd_loss``, with its names."""
    found_BK = _divergence(_log_probs(student_logits), _log_probs(teacher_logits), beta)
    return _mean(found_BK, labels != IGNORED_LABEL, num_items_in_batch)


def _mean(found_BK: torch.Tensor, mask_BK: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    return found_BK.masked_fill(~mask_BK, 0).sum() / (mask_BK.sum().clamp(min=1) if num_items is None else num_items)


def _log_probs(logits_BKV: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits_BKV.float() / temperature).log_softmax(-1)


def _divergence(own_BKV: torch.Tensor, teacher_BKV: torch.Tensor, beta: float) -> torch.Tensor:
    """Return forward KL (beta 0), reverse KL (1) or the Jensen-Shannon divergence between: ``[B, K, V] -> [B, K]``."""
    if beta == 0:
        return (teacher_BKV.exp() * (teacher_BKV - own_BKV)).sum(-1)
    if beta == 1:
        return (own_BKV.exp() * (own_BKV - teacher_BKV)).sum(-1)
    mixed_BKV = torch.logaddexp(own_BKV + math.log1p(-beta), teacher_BKV + math.log(beta))
    of_teacher_BKV = teacher_BKV.exp() * (teacher_BKV - mixed_BKV)
    return (beta * of_teacher_BKV + (1 - beta) * own_BKV.exp() * (own_BKV - mixed_BKV)).sum(-1)

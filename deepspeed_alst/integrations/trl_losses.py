"""TRL's trainers with a loss of their own: preference and reinforcement learning.

They make it of each token's log-probability, which TRL's fused head gives for whole sequences here (trl_fused_head.py).
P ranks take one's batch at a time, so what is gathered over all ranks for the log is gathered in the last of P turns.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import send_to_device

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError

_LOSSES = ("compute_loss", "_compute_loss", "_compute_kl_logps")
_LIBRARIES = ("trl.", "transformers.", "deepspeed_alst.")
TRAINERS = ("DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer", "RewardTrainer")
_PLAIN = ("", "_BaseTrainer", "SFTTrainer")
_ALL_BATCHES = "it is made of the batches of all ranks at once, which are micro-steps one after another here"
REFUSED = {
    "KTOTrainer": {"loss_type": ("apo_zero_unpaired", f"the KL that it subtracts: {_ALL_BATCHES}")},
    "GRPOTrainer": {"top_entropy_quantile": (1.0, _ALL_BATCHES), "use_adaptive_entropy": (False, _ALL_BATCHES)},
}
"""Arguments of a trainer, each with the only value that it may have, and the reason."""


def _kind(trainer: Any) -> str:
    """Return the name of TRL's class of a trainer; empty if it is none."""
    return next((each.__name__ for each in type(trainer).__mro__ if each.__module__.startswith("trl.")), "")


def makes_own_loss(trainer: Any) -> bool:
    """Return True for a trainer of TRL whose loss is not the model's own."""
    kind = _kind(trainer)
    return kind in TRAINERS or (kind == "SFTTrainer" and trainer.args.loss_type not in (None, "nll"))


def refusals(trainer: Any) -> list[str]:
    """Return why a trainer of TRL, or its arguments, cannot work on shards."""
    kind = _kind(trainer)
    if kind not in (*_PLAIN, *TRAINERS):
        return [
            f"{kind}: it needs outputs of whole sequences other than log-probabilities, and a rank has those of a "
            f"shard. Leave sequence_parallel_size out, or use one of {', '.join(['SFTTrainer', *TRAINERS])}"
        ]
    problems = [
        f"{name}={getattr(trainer.args, name)!r}: {reason}. Set it to {value!r}"
        for name, (value, reason) in REFUSED.get(kind, {}).items()
        if getattr(trainer.args, name, value) != value
    ]
    own = [name for name in _LOSSES if not getattr(trainer, name, makes_own_loss).__module__.startswith(_LIBRARIES)]
    if own and makes_own_loss(trainer):
        problems.append(
            f"{', '.join(own)}, overridden in {type(trainer).__name__}: it runs once for each batch of {kind}'s ranks, "
            "and what it gathers or counts would not be that of SP 1. Leave sequence_parallel_size out, or write the "
            "loss with deepspeed_alst.log_probs in a loop of your own"
        )
    return problems


class MicroSteps:
    """The P micro-steps of one training step, which log what one step at SP 1 does."""

    def __init__(self, trainer: Any, own: int, number: int) -> None:
        """``own`` is the micro-step of this rank's own batch, of ``number``."""
        self._trainer, self._own, self._last = trainer, own, number - 1
        self._values: dict[Any, torch.Tensor] = {}

    def prepare(self, inputs: Any, patches: PatchSet) -> Any:
        """Return this rank's own batch, with completions and rewards if the trainer makes them."""
        trainer = self._trainer
        if trainer._prepare_inputs.__module__ == "transformers.trainer":
            return inputs
        trainer.model_wrapped.train()  # as the step that was wrapped does before it
        made = trainer._prepare_inputs(inputs)
        patches.set(trainer, "_prepare_inputs", lambda batch: send_to_device(batch, trainer.args.device))
        return made

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
            if place == self._last and key not in self._values:
                raise UnsupportedModelError(
                    f"{type(trainer).__name__} gathers over ranks at {site[0]}:{site[1]} in one of its batches only, "
                    "which is not supported under sequence parallelism"
                )
            return self._values.get(key, x)

        def gather(original: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
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
            for function in (gather, reduce):
                original = getattr(trainer.accelerator, function.__name__)
                patches.set(trainer.accelerator, function.__name__, functools.partial(function, original))
            yield
        if place != self._last:
            metrics.clear()
            metrics.update(before)
            trainer._total_train_tokens = tokens


def _calling_line() -> tuple[str, int]:
    """Return file and line of the trainer's code that gathers: the first outside of this module and accelerate."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/accelerate/" in frame.f_code.co_filename:
        assert frame.f_back is not None
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno

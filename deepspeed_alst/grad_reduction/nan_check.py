"""Drop an optimizer step with a NaN or Inf loss or gradient before a weight changes, and raise.

Losses stay on the device until the step; all ranks agree through one number over gloo. Gradients are checked where
DeepSpeed checks them. Under fp16 nothing is done: DeepSpeed's loss scaling skips the step and lowers the scale.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.utils import safe_get_full_grad

from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import raise_on_all_ranks
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import NonFiniteGradientError, NonFiniteLossError, SetupError
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext

# Relative tolerance for one loss on two ranks, which compute it from the same sum.
_ALIKE = 1e-5


class NonFiniteLossCheck:
    """Losses of one engine since its last optimizer step, with the batches they belong to."""

    def __init__(self, groups: SequenceGroups, calls: ForwardContext) -> None:
        self._groups, self._calls = groups, calls
        self._losses: list[torch.Tensor] = []
        self._batches: list[tuple[int, int] | None] = []
        self._batch: tuple[int, int] | None = None
        self.dropper: StepDropper | None = None
        """None before the engine is built, and under fp16."""

    def note_batch(self, rank: int, number: int) -> None:
        """Record the next micro-step's batch: its rank and its number in that rank's loader, from 0 in each epoch."""
        self._batch = (rank, number)

    def add(self, loss: torch.Tensor) -> None:
        """Record the loss of a backward that begins."""
        self._losses.append(loss.detach().double())
        self._batches.append(self._batch)
        self._batch = None

    @contextlib.contextmanager
    def step(self, engine: Any) -> Iterator[None]:
        """Run the engine's step inside.

        Raises:
            NonFiniteLossError: on all ranks, whichever saw it, after the step was dropped; training can go on as if its
                batches had not been there.
            NonFiniteGradientError: the same, for gradients.
        """
        if not engine.is_gradient_accumulation_boundary():
            yield
            return
        losses = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0, dtype=torch.float64)
        batches, self._losses, self._batches = self._batches, [], []
        if len(losses) and self._calls.makes_whole_loss:
            self._check_alike(losses)
        if self.dropper is None:
            yield
            return
        number = engine.global_steps + 1
        error = self._error(losses.tolist(), batches, number)
        found = torch.tensor([error is not None], dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._groups.control_group)
        with self.dropper.dropping(bool(found.item())):
            yield
        if found.item():
            raise_on_all_ranks(error, self._groups.control_group)
        if getattr(engine.optimizer, "overflow", False) or self.dropper.parameter:
            raise _gradient_error(self.dropper.parameter, number)

    def _check_alike(self, losses: torch.Tensor) -> None:
        """Raise SetupError if the ranks of a sequence have different losses, which are then losses of shards."""
        bounds = torch.stack([losses, -losses])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self._groups.sp_control_group)
        high, low = bounds[0], -bounds[1]
        unlike = (high - low > _ALIKE * torch.maximum(high.abs(), low.abs())).nonzero().flatten().tolist()
        error = None
        if unlike:
            place = unlike[0]
            error = SetupError(
                f"engine.backward was given {float(losses[place]):.6g} on this rank, and losses from "
                f"{float(low[place]):.6g} to {float(high[place]):.6g} on the ranks of one sequence: the program has "
                "made its loss of a shard's labels or values, and the model returns that of the whole sequence on "
                "every rank. Use that as it is, or scale it by what all ranks know (num_items_in_batch)."
            )
        raise_on_all_ranks(error, self._groups.control_group)

    def _error(
        self, losses: list[float], batches: list[tuple[int, int] | None], step: int
    ) -> NonFiniteLossError | None:
        """Return the error of this rank's first loss that is not finite."""
        for place, (loss, batch) in enumerate(zip(losses, batches, strict=True)):
            if not math.isfinite(loss):
                # HF Trainer: one batch of each rank in turn.
                whose = f"a batch of rank {self._groups.ranks[place % self._groups.sp_size]}"
                if batch is not None:
                    whose = "rank {}'s batch {} of this epoch (counted from 0)".format(*batch)
                return NonFiniteLossError(
                    f"the loss is {loss} in optimizer step {step}, micro-step {place + 1} of {len(losses)}: {whose}. "
                    "No weight has changed: the step was dropped. Look at the tokens and labels of that batch; if they "
                    "are all right, the weights went astray before: lower the learning rate, or set gradient_clipping."
                )
        return None


def _gradient_error(parameter: str | None, step: int) -> NonFiniteGradientError:
    what = "the gradients' norm, though no gradient," if parameter is None else f"the gradient of {parameter}"
    return NonFiniteGradientError(
        f"{what} is NaN or infinite in optimizer step {step}, and the losses are finite. No weight has changed: the "
        "step was dropped. Look at what the backward of that parameter does (a division by 0, a square root at 0, a "
        "hook, an overflow in half precision); to train on without these batches, catch this error and go on."
    )


class StepDropper:
    """Decide each optimizer step of one engine: take it, or drop it as DeepSpeed does if gradients overflow.

    It wraps each optimizer's own check of its gradients. Only ZeRO 0 in fp32 has none: there each step reads them once.
    """

    def __init__(self, engine: Any, patches: PatchSet) -> None:
        self._engine, self._wanted, self._norm = engine, False, 0.0
        self.parameter: str | None = None
        """First parameter with a NaN or Inf gradient in the last step."""
        self._looks_itself = False
        optimizer = engine.optimizer
        if hasattr(optimizer, "overflow_checker"):  # ZeRO 0 in bf16
            checker = optimizer.overflow_checker
            patches.set(checker, "has_overflow", partial(self._has_overflow, checker.has_overflow))
        elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer
            patches.set(optimizer, "get_grads_for_norm", partial(self._grads_for_norm, optimizer.get_grads_for_norm))
        elif hasattr(optimizer, "_update_scale"):
            patches.set(optimizer, "_update_scale", partial(self._update_scale, optimizer._update_scale))
            if hasattr(optimizer, "scaled_global_norm"):  # bf16 ignores it if check_grad_overflow is false
                patches.set(optimizer, "scaled_global_norm", partial(self._global_norm, optimizer.scaled_global_norm))
        else:  # torch optimizer, on ZeRO 0 in fp32
            self._looks_itself = True

    @contextlib.contextmanager
    def dropping(self, wanted: bool) -> Iterator[None]:
        """Drop the enclosed step if ``wanted``, equal on all ranks, or if its gradients are NaN or Inf."""
        self._wanted, self._norm, self.parameter = wanted, 0.0, None
        with PatchSet() as patches:
            if self._looks_itself:
                grads = [param.grad for param in self._engine.module.parameters() if param.grad is not None]
                if self._is_dropped(torch.nn.utils.get_total_norm(grads, norm_type=math.inf)):
                    patches.set(self._engine.optimizer, "step", lambda *args, **kwargs: None)
                    patches.set(self._engine.optimizer, "overflow", True)
            yield

    def _is_dropped(self, norm: Any) -> bool:
        """Return True for a norm that is invalid, on all ranks alike, and find the parameter."""
        invalid = is_invalid_grad_norm(norm)
        if invalid and not self._wanted:
            for name, param in self._engine.module.named_parameters():
                grad = safe_get_full_grad(param) if param.requires_grad else None
                if grad is not None and not torch.isfinite(grad).all():
                    self.parameter = name
                    break
        return invalid or self._wanted

    def _has_overflow(self, original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
        return self._is_dropped(math.inf if original(*args, **kwargs) else 0.0)

    def _grads_for_norm(self, original: Callable[..., Any], for_clipping: bool = False) -> Any:
        """Replace what zero_paths.py returns for the norm, which is the norm itself."""
        found = original(for_clipping)
        if for_clipping:
            return found
        (norm,), experts = found
        return [torch.full_like(norm, math.inf) if self._is_dropped(norm) else norm], experts

    def _global_norm(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._norm = original(*args, **kwargs)
        return self._norm

    def _update_scale(self, original: Callable[..., None], has_overflow: bool = False) -> None:
        """Set ``overflow``, which ZeRO 1 to 3 read after this."""
        self._engine.optimizer.overflow = self._is_dropped(math.inf if has_overflow else self._norm)
        original(self._engine.optimizer.overflow)

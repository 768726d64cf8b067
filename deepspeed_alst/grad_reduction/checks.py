"""Checks before a weight changes: the average over ranks in the first step, NaN and Inf in each."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.utils import is_invalid_grad_norm
from deepspeed.utils import safe_get_full_grad

from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import tolerance
from deepspeed_alst.distributed.collectives import raise_on_all_ranks
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import NonFiniteGradientError, NonFiniteLossError, SetupError

_ELEMENTS = 1024
_MAX_GRAD_ELEMENTS = 1 << 26  # elements; DeepSpeed returns the full gradient in fp32, 256 MiB here
# Relative tolerance for one loss on two ranks, which compute it from the same sum.
_ALIKE = 1e-5


class AverageCheck:
    """Check in an engine's first optimizer step that gradients are averages over all ranks.

    It averages some elements of two parameters' local gradients itself, and compares after the backward that reduces.
    A step in which the program clears or changes gradients between two backwards is not compared, as DeepSpeed's result
    then depends on the ZeRO stage; the next one is.
    """

    def __init__(self, engine: Any, groups: SequenceGroups, summed_in: torch.dtype, patches: PatchSet) -> None:
        self._engine, self._groups, self._summed_in = engine, groups, summed_in
        trained = ((name, param) for name, param in engine.module.named_parameters() if param.requires_grad)
        small = ((name, param) for name, param in trained if 0 < _numel(param) <= _MAX_GRAD_ELEMENTS)
        self._watched = sorted(small, key=lambda each: _numel(each[1]))
        self._num_hooks = self._count_hooks()
        self._begin_step()
        if hasattr(engine.optimizer, "zero_grad"):  # an engine that evaluates only has none
            patches.wrap(engine.optimizer, "zero_grad", lambda original: partial(self._zero_grad, original))

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Run the engine's backward inside.

        Raises:
            SetupError: on all ranks, if the averaging factor is wrong.
        """
        if self._engine.global_steps != self._step:
            self._begin_step()
        self._is_touched |= self._left != self._versions() or self._count_hooks() > self._num_hooks
        with contextlib.ExitStack() as hooks:
            # After the program's own hooks, which may change the gradient.
            for name, param in self._watched:
                if param.requires_grad:
                    hooks.callback(param.register_hook(partial(self._add, name)).remove)
            yield
        self._left = self._versions()
        if self._watched and self._engine.is_gradient_accumulation_boundary() and self._compare():
            self._watched.clear()

    def _begin_step(self) -> None:
        self._step, self._is_touched = self._engine.global_steps, False
        # Sums of some elements of each parameter's local gradients.
        self._local: dict[str, torch.Tensor] = {}
        self._left: list[tuple[int, int] | None] = []

    def _zero_grad(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._is_touched |= bool(self._local)
        return original(*args, **kwargs)

    def _count_hooks(self) -> int:
        return sum(len(param._post_accumulate_grad_hooks or ()) for _, param in self._watched)

    def _versions(self) -> list[tuple[int, int] | None]:
        """Return each gradient's identity and version, by which a change shows."""
        grads = [param.grad for name, param in self._watched if name in self._local]
        return [None if grad is None else (id(grad), grad._version) for grad in grads]

    def _add(self, name: str, grad: torch.Tensor) -> None:
        self._local[name] = self._local.get(name, 0) + _spread(grad.detach())

    def _choose(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the smallest and the largest parameter with a gradient on some rank: half of a fresh LoRA's are zero.

        DeepSpeed handles parameters larger than its bucket separately. Empty if a rank's program touched gradients.
        """
        alive = [name in self._local and bool(self._local[name].any()) for name, _ in self._watched]
        facts = torch.tensor([self._is_touched, *alive], dtype=torch.int32)
        dist.all_reduce(facts, dist.ReduceOp.MAX, group=self._groups.control_group)
        touched, *lives = facts.tolist()
        chosen = [each for each, life in zip(self._watched, lives, strict=True) if life and not touched]
        return [chosen[0], chosen[-1]] if chosen else []

    def _compare(self) -> bool:
        """Raise SetupError if a gradient is not the average; return True if any was compared."""
        compared = False
        for name, param in self._choose():
            reduced = safe_get_full_grad(param)
            if reduced is None:
                raise SetupError(f"{name}: safe_get_full_grad returns no gradient to compare with the average")
            reduced = _spread(reduced)
            expected = self._local[name].to(reduced.device) if name in self._local else torch.zeros_like(reduced)
            dist.all_reduce(expected, group=self._groups.world_group)
            expected /= self._groups.dp_size * self._groups.sp_size
            square = expected.dot(expected)
            if not torch.isfinite(square) or square == 0:
                continue
            # The factor as a projection. Both include fp16's loss scale: DeepSpeed unscales in the step.
            factor, compared = float(expected.dot(reduced) / square), True
            # A wrong divisor gives a factor of at least 1 + 1/world; bf16 sums err by about 1e-2.
            if abs(factor - 1.0) > max(tolerance(param.dtype), tolerance(self._summed_in)):
                raise SetupError(
                    f"the gradient of {name} came out as {factor:.4g} times the average over all ranks (ZeRO stage "
                    f"{self._engine.zero_optimization_stage()}), and no weight has changed: deepspeed_alst does not "
                    "support this configuration; please report it"
                )
        return compared


def _numel(param: torch.nn.Parameter) -> int:
    return getattr(param, "ds_numel", param.numel())


def _spread(x: torch.Tensor) -> torch.Tensor:
    """Sample up to 2047 elements across a tensor: most rows of an embedding's gradient are zero."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // _ELEMENTS)].to(torch.float64)


class NonFiniteCheck:
    """Drop an optimizer step with a NaN or Inf loss or gradient on all ranks, and raise.

    Losses stay on the device until the step; all ranks agree through one number over gloo. A step is dropped as by
    DeepSpeed if gradients overflow, in each optimizer's own check; only ZeRO 0 in fp32 has none, and reads them once.
    """

    def __init__(self, groups: SequenceGroups, calls: ForwardContext) -> None:
        self._groups, self._calls = groups, calls
        self._losses: list[torch.Tensor] = []
        self._batches: list[tuple[int, int] | None] = []
        self._batch: tuple[int, int] | None = None
        self._drops, self._reads_gradients = False, False
        self._drop_next, self._norm = False, 0.0
        self._parameter: str | None = None  # the first with a NaN or Inf gradient in this step

    def watch(self, engine: Any, patches: PatchSet) -> None:
        """Drop steps of an engine, by the check of its optimizer; under fp16 DeepSpeed's loss scaling does."""
        if engine.fp16_enabled():
            return
        self._drops, self._module, self._optimizer = True, engine.module, engine.optimizer
        optimizer, checker = engine.optimizer, getattr(engine.optimizer, "overflow_checker", None)
        if checker is not None:  # ZeRO 0 in bf16
            patches.set(checker, "has_overflow", partial(self._has_overflow, checker.has_overflow))
        elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer
            patches.set(optimizer, "get_grads_for_norm", partial(self._grads_for_norm, optimizer.get_grads_for_norm))
        elif hasattr(optimizer, "_update_scale"):
            patches.set(optimizer, "_update_scale", partial(self._update_scale, optimizer._update_scale))
            if hasattr(optimizer, "scaled_global_norm"):  # bf16 ignores it if check_grad_overflow is false
                patches.set(optimizer, "scaled_global_norm", partial(self._global_norm, optimizer.scaled_global_norm))
        else:  # torch optimizer, on ZeRO 0 in fp32
            self._reads_gradients = True

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
            NonFiniteLossError: on all ranks, after the step was dropped; training can continue as if its batches had
                not been there.
            NonFiniteGradientError: the same, for gradients.
        """
        if not engine.is_gradient_accumulation_boundary():
            yield
            return
        losses = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0, dtype=torch.float64)
        batches, self._losses, self._batches = self._batches, [], []
        if len(losses) and self._calls.makes_whole_loss:
            self._check_alike(losses)
        if not self._drops:
            yield
            return
        number, group = engine.global_steps + 1, self._groups.control_group
        error = self._loss_error(losses.tolist(), batches, number)
        found = torch.tensor([error is not None], dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        self._drop_next, self._norm, self._parameter = bool(found.item()), 0.0, None
        with self._without_step() if self._reads_gradients else contextlib.nullcontext():
            yield
        if self._drop_next:
            raise_on_all_ranks(error, group)
        if getattr(engine.optimizer, "overflow", False) or self._parameter:
            subject = f"the gradient of {self._parameter}" if self._parameter else "the norm of the gradients"
            raise NonFiniteGradientError(
                f"{subject} is NaN or Inf in optimizer step {number}, and the losses are finite. No weight has "
                "changed: the step was dropped. Check the backward of that parameter for a division by 0, a square "
                "root at 0, a hook or an overflow in half precision. To skip such batches, catch this error and "
                "continue."
            )

    def _check_alike(self, losses: torch.Tensor) -> None:
        """Raise SetupError if the ranks of a sequence have different losses, which are then losses of shards."""
        bounds = torch.stack([losses, -losses])
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=self._groups.sp_control_group)
        high, low = bounds[0], -bounds[1]
        unlike = (high - low > _ALIKE * torch.maximum(high.abs(), low.abs())).nonzero()
        error = None
        if len(unlike):
            place = unlike[0]
            error = SetupError(
                f"engine.backward was given the loss {float(losses[place]):.6g} on this rank, and from "
                f"{float(low[place]):.6g} to {float(high[place]):.6g} on the ranks of one sequence: the program has "
                "computed its loss from this rank's shard alone. The model returns the loss of the whole sequence on "
                "every rank: use it, or scale it by what all ranks know (num_items_in_batch)."
            )
        raise_on_all_ranks(error, self._groups.control_group)

    def _loss_error(
        self, losses: list[float], batches: list[tuple[int, int] | None], step: int
    ) -> NonFiniteLossError | None:
        """Return the error of this rank's first NaN or Inf loss."""
        place = next((place for place, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if place is None:
            return None
        # HF Trainer: one batch of each rank in turn.
        whose = f"a batch of rank {self._groups.ranks[place % self._groups.sp_size]}"
        if (batch := batches[place]) is not None:
            whose = "rank {}'s batch {} of this epoch (counted from 0)".format(*batch)
        return NonFiniteLossError(
            f"the loss is {losses[place]} in optimizer step {step}, micro-step {place + 1} of {len(losses)}: {whose}. "
            "No weight has changed: the step was dropped. Look at the tokens and labels of that batch; if they are "
            "valid, an earlier step has diverged: lower the learning rate, or set gradient_clipping."
        )

    @contextlib.contextmanager
    def _without_step(self) -> Iterator[None]:
        """Disable a torch optimizer's step inside if it is to be dropped."""
        grads = [param.grad for param in self._module.parameters() if param.grad is not None]
        with PatchSet() as patches:
            if self._is_dropped(torch.nn.utils.get_total_norm(grads, norm_type=math.inf)):
                patches.set(self._optimizer, "step", lambda *args, **kwargs: None)
                patches.set(self._optimizer, "overflow", True)
            yield

    def _is_dropped(self, norm: Any) -> bool:
        """Return True for a norm that is invalid, on all ranks alike, and find the parameter."""
        invalid = is_invalid_grad_norm(norm)
        if invalid and not self._drop_next:
            for name, param in self._module.named_parameters():
                grad = safe_get_full_grad(param) if param.requires_grad else None
                if grad is not None and not torch.isfinite(grad).all():
                    self._parameter = name
                    break
        return invalid or self._drop_next

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
        self._optimizer.overflow = self._is_dropped(math.inf if has_overflow else self._norm)
        original(self._optimizer.overflow)

"""Training metrics per step: events for DeepSpeed's monitor and a line on rank 0 (docs/metrics.md).

DeepSpeed's own keys decide: a line every ``steps_per_print`` steps if it is set; events at the same interval, or at
every step if it is not, for any enabled monitor. Without either nothing is installed.

Between two lines counts accumulate on the device and nothing is read. At a line they are read, and the ranks exchange a
few numbers once. Values of a step belong to the step that ends there; rates, shares and means cover all steps since the
last line.

Legend: B batch, s tokens of this rank's shard (at SP 1 the whole sequence), P = sp_size.
"""

import contextlib
import itertools
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from deepspeed_alst.engine.progress import Report, progress_line
from deepspeed_alst.errors import NonFiniteLossError
from deepspeed_alst.ledger.step_flops import Span, StepSizes, alst_flops, model_flops
from deepspeed_alst.models.sizes import attention_spans, step_sizes
from deepspeed_alst.parallel.agreement import of_rank_0
from deepspeed_alst.parallel.traffic import sent_bytes


@dataclass(frozen=True)
class Asked:
    """Reporting interval and enabled outputs."""

    every: int
    """Interval in optimizer steps."""
    line: bool
    events: bool


@dataclass(frozen=True)
class _Moved:
    """Bytes moved and seconds waited by this rank since its engine was built."""

    sent: int = 0
    to_host: int = 0
    to_disk: int = 0
    waited: float = 0.0


def metrics_of(engine: Any) -> "Metrics | None":
    """Build an engine's metrics if its ds_config asks for a line or has a monitor.

    Collective over all ranks: rank 0's ds_config decides for all, because rank 0 prints and writes.
    """
    asked = of_rank_0(_asked(engine))
    return Metrics(engine, asked) if asked.line or asked.events else None


def _asked(engine: Any) -> Asked:
    steps = engine.steps_per_print()
    # accelerate uses infinity for never.
    line = steps is not None and math.isfinite(steps)
    return Asked(int(steps) if line else 1, line, bool(engine.monitor.enabled))


class Metrics:
    """Counters of one engine since its last line."""

    def __init__(self, engine: Any, asked: Asked) -> None:
        self._engine, self._asked = engine, asked
        self._session = getattr(engine, "alst", None)
        if self._session is not None:
            # For loaders made from here on. A program that computes its own loss may rely on the exact batch keys.
            self._session.marks_padding |= self._session.calls.makes_whole_loss
        self._spans = [span for span, _ in attention_spans(engine.module)]
        self._sizes: StepSizes | None = None
        self._loss: torch.Tensor | None = None
        self._begin: float | None = None
        self._before = _Moved()
        # Bytes sent by the end of the last step, until the next one begins; bytes sent by evaluations in between.
        self._step_end: int | None = None
        self._sent_aside = 0
        self._clear()

    def _clear(self) -> None:
        self._num_steps = self._num_tokens = 0
        # Real tokens, then each span's pairs for the model and for ALST; on the device if computed there.
        self._sums: list[Any] = [0] * (1 + 2 * len(self._spans))

    def _is_due(self) -> bool:
        """Return True if a line or events follow the current step."""
        return (self._engine.global_steps + 1) % self._asked.every == 0

    @contextlib.contextmanager
    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Run a forward inside; count the tokens of what is trained on."""
        if self._begin is None:
            self._begin = time.perf_counter()
        trains = self._engine.module.training and torch.is_grad_enabled()
        if trains and self._step_end is not None:
            self._sent_aside, self._step_end = self._sent_aside + self._sent() - self._step_end, None
        yield
        if trains:
            self._count(args, kwargs)

    def add_loss(self, scaled: torch.Tensor) -> None:
        """Add the loss of a backward, scaled as its gradient is, to those of a step that is reported."""
        if self._is_due():
            loss = scaled.detach().double()
            self._loss = loss if self._loss is None else self._loss + loss

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run the engine's step inside; report when it is due."""
        before, due = self._engine.global_steps, self._is_due()
        # A schedule goes on to the next step's within the call.
        rates = self._engine.get_lr() if due else []
        try:
            yield
        except NonFiniteLossError:  # the step was dropped: the program may go on
            self._loss = None
            raise
        if self._engine.global_steps != before:
            self._num_steps, self._step_end = self._num_steps + 1, self._sent()
            if due:
                self._tell(float(rates[0]) if rates else None)

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        tokens = next((each for each in given if isinstance(each, torch.Tensor) and each.dim() > 1), None)
        if tokens is None:
            return
        B, s = tokens.shape[:2]
        self._num_tokens += B * s
        if self._session is None:
            found = _whole_counts(B, s, kwargs, self._spans)
        else:
            calls, P = self._session.calls, self._session.groups.sp_size
            lengths = [end - begin for begin, end in itertools.pairwise(calls.documents)] or [s * P] * B
            real_Bs, positions_Bs = calls.real_tokens, _text_positions(kwargs["position_ids"], B)
            found = [B * s if real_Bs is None else real_Bs.sum()]
            found += [_seen(positions_Bs, real_Bs, span) for span in self._spans]
            found += [sum(map(span.both_ways, lengths)) / P for span in self._spans]
        self._sums = [before + more for before, more in zip(self._sums, found, strict=True)]

    def _tell(self, rate: float | None) -> None:
        if self._sizes is None:  # late: checkpointing may be enabled after the engine is built
            self._sizes = step_sizes(self._engine.module)
        real, *pairs = [float(each) for each in self._sums]  # the first read synchronizes with the device
        seen, whole = pairs[: len(self._spans)], pairs[len(self._spans) :]
        flops = [0.0, 0.0]
        if self._sizes is not None:
            flops = [model_flops(self._sizes, real, seen), alst_flops(self._sizes, self._num_tokens, whole)]
        loss = math.nan if self._loss is None else float(self._loss)
        now, before = self._moved(), self._before
        moved = [now.sent - before.sent, now.to_host - before.to_host, now.to_disk - before.to_disk]
        highest = [now.waited - before.waited, _peak_device_bytes(), _peak_host_bytes()]
        added = [loss, real, self._num_tokens, *flops, *moved]
        everyone = self._gather([*added, *highest])
        end = time.perf_counter()
        if dist.get_rank() == 0:
            self._publish(self._report(everyone, len(added), end - (self._begin or end), rate))
        self._clear()
        self._loss, self._before, self._begin = None, now, end

    def _report(self, everyone: torch.Tensor, num_added: int, seconds: float, rate: float | None) -> Report:
        """Build the report from all ranks' numbers: the sum of the first ``num_added``, the maximum of the others."""
        engine, session, ranks, steps = self._engine, self._session, len(everyone), self._num_steps
        sums, (waited, device_peak, host_peak) = everyone.sum(0).tolist(), everyone[:, num_added:].amax(0).tolist()
        loss, real, num_tokens, of_model, of_alst, sent, to_host, to_disk = sums[:num_added]
        norm, offloads = engine.get_global_grad_norm(), hasattr(engine, "alst_offload")
        return Report(
            loss=None if self._loss is None else loss / ranks,
            # A skipped step has no gradient norm.
            grad_norm=float(norm) if norm is not None and engine.was_step_applied() else None,
            lr=rate,
            tokens_per_second=real / seconds,
            padding_share=1 - real / num_tokens if num_tokens else 0.0,
            model_flops_per_second=of_model / ranks / seconds if self._sizes else None,
            hardware_flops_per_second=of_alst / ranks / seconds if self._sizes else None,
            peak_device_bytes=device_peak or None,
            peak_host_bytes=host_peak,
            wire_bytes=session.reduction_bytes + sent / ranks / steps if session is not None else None,
            offload_host_bytes=to_host / ranks / steps if offloads else None,
            offload_disk_bytes=to_disk / ranks / steps if offloads else None,
            offload_wait_seconds=waited / steps if offloads else None,
        )

    def _publish(self, report: Report) -> None:
        engine = self._engine
        if self._asked.line:
            print(progress_line(engine.global_steps, report), file=sys.stderr, flush=True)
        if self._asked.events:
            # Samples, as in DeepSpeed's own events: some monitors reject a step that decreases.
            engine.monitor.write_events([(*each, engine.global_samples) for each in report.events()])

    def _moved(self) -> _Moved:
        sent = self._sent() - self._sent_aside
        store = getattr(self._engine, "alst_offload", None)
        if store is None:
            return _Moved(sent)
        counts, waited = store.counts, 0.0 if store.spill is None else store.spill.seconds_waited
        return _Moved(sent, counts.bytes_out - counts.bytes_to_disk, counts.bytes_to_disk, waited)

    def _sent(self) -> int:
        return 0 if self._session is None else sent_bytes(self._session.groups.sp_group)

    def _gather(self, mine: list[float]) -> torch.Tensor:
        """Gather the numbers of all ranks: ``[ranks, numbers]`` on the host."""
        group, device = None, self._engine.device
        if self._session is not None:
            group, device = self._session.groups.control_group, "cpu"
        own = torch.tensor(mine, dtype=torch.float64, device=device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, own, group=group)
        return torch.stack(everyone).cpu()


def _whole_counts(B: int, S: int, kwargs: dict[str, Any], spans: list[Span]) -> list[Any]:
    """Count real tokens and pairs of whole sequences with their mask, in the order of ``Metrics._sums``."""
    mask_BS, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    mask_BS = mask_BS != 0 if isinstance(mask_BS, torch.Tensor) and mask_BS.shape == (B, S) else None
    of_rows = [B * span.both_ways(S) for span in spans]
    if mask_BS is None and positions is None:
        return [B * S, *(B * span.pairs(S) for span in spans), *of_rows]
    positions_BS = mask_BS.cumsum(1) - 1 if positions is None else _text_positions(positions, B)
    real = B * S if mask_BS is None else mask_BS.sum()
    if positions is not None:  # they restart at packed documents
        of_rows = [2 * _seen(positions_BS, None, span) - B * S for span in spans]
    return [real, *(_seen(positions_BS, mask_BS, span) for span in spans), *of_rows]


def _text_positions(positions: torch.Tensor, B: int) -> torch.Tensor:
    """Expand ``[S]``, ``[1, S]``, ``[B, S]`` or, with several dims, ``[3, B, S]`` to ``[B, S]``."""
    text = positions[0] if positions.dim() == 3 else positions
    return text.expand(B, text.shape[-1])


def _seen(positions_Bs: torch.Tensor, real_Bs: torch.Tensor | None, span: Span) -> torch.Tensor:
    """Count the pairs of the real tokens at these positions and the tokens that they attend to."""
    seen_Bs = positions_Bs + 1
    if span.window is not None:
        seen_Bs = seen_Bs.clamp(max=span.window)
    elif span.chunk is not None:
        seen_Bs = positions_Bs % span.chunk + 1
    return (seen_Bs if real_Bs is None else seen_Bs * real_Bs).sum()


def _peak_device_bytes() -> int:
    """Return the peak since program start or last reset; 0 on CPU, where DeepSpeed reports host memory."""
    accelerator = get_accelerator()
    return 0 if accelerator.device_name() == "cpu" else accelerator.max_memory_allocated()


def _peak_host_bytes() -> int:
    # Linux reports KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

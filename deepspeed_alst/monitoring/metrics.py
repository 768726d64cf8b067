"""Metrics of training steps: loss, throughput, FLOPs, memory and traffic (docs/metrics.md).

Between two lines counts accumulate on the device and nothing is read. At a line they are read, and the ranks exchange a
few numbers once. Legend: B batch, s tokens of this rank's shard (at SP 1 the whole sequence), N packed documents.
"""

import contextlib
import dataclasses
import functools
import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.distributed.collectives import sent_bytes
from deepspeed_alst.errors import NonFiniteLossError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.monitoring.step_flops import StepFlops, step_flops


@dataclass(frozen=True)
class Report:
    """Values of one report, None if absent; per-rank values are means over ranks, peaks and waits maxima.

    Loss (nats per token), gradient norm (before clipping) and learning rate are of the step that ends there; rates,
    shares and means cover all steps since the last line.
    """

    loss: float | None
    grad_norm: float | None
    lr: float | None
    tokens_per_second: float  # of the whole job, without padding
    padding_share: float
    model_flops_per_second: float | None  # per rank, StepFlops.model
    hardware_flops_per_second: float | None  # per rank, StepFlops.alst, with padding
    peak_device_bytes: float | None
    peak_host_bytes: float
    wire_bytes: float | None  # sent by a rank per step: gradient reduction and the layers' all-to-alls
    offload_host_bytes: float | None  # sent by a rank per step, as those to disk
    offload_disk_bytes: float | None
    offload_overflows: float | None  # per step, tensors of a rank that were stored unpacked
    offload_wait_seconds: float | None  # per step, for the disk

    def events(self) -> dict[str, float]:
        """Return values by a monitor's names."""
        return {f"alst/{name}": value for name, value in asdict(self).items() if value is not None}

    def line(self, step: int) -> str:
        """Format one line; each number has its unit and, if there are several, its convention."""
        of_step = (("loss", self.loss, ".4f"), ("norm", self.grad_norm, ".4g"), ("lr", self.lr, ".3g"))
        parts = [f"{name} {value:{digits}}" for name, value, digits in of_step if value is not None]
        parts.append(f"{self.tokens_per_second:,.0f} tokens/s, padding {self.padding_share:.1%}")
        if self.model_flops_per_second is not None and self.hardware_flops_per_second is not None:
            model, hardware = map(_rate, (self.model_flops_per_second, self.hardware_flops_per_second))
            parts.append(
                f"per rank: {model} model (6N, causal half), {hardware} hardware (ALST: full square, recomputation)"
            )
        device = "" if self.peak_device_bytes is None else f"{format_bytes(self.peak_device_bytes)} device, "
        parts.append(f"peak {device}{format_bytes(self.peak_host_bytes)} host")
        if self.wire_bytes is not None:
            parts.append(f"wire {format_bytes(self.wire_bytes, 1)}")
        if self.offload_host_bytes is not None:
            disk = f", {format_bytes(self.offload_disk_bytes or 0)} disk, waited {self.offload_wait_seconds:.2f} s"
            overflows = f", {self.offload_overflows:.4g} overflows" if self.offload_overflows else ""
            host = f"offload {format_bytes(self.offload_host_bytes)} host"
            parts.append(host + (disk if self.offload_disk_bytes else "") + overflows)
        return " | ".join((f"alst: step {step}", *parts))


class Metrics:
    """Counters of one engine since its last line: every so many optimizer steps it writes events, and prints a line."""

    def __init__(self, engine: Any, every: int, prints: bool) -> None:
        self._engine, self._every, self._prints = engine, every, prints
        self._session = getattr(engine, "alst", None)
        if self._session is not None:
            # For loaders made from here on. A program that computes its own loss may rely on the exact batch keys.
            marks = self._session.sharding.marks_padding or self._session.calls.makes_whole_loss
            self._session.sharding = dataclasses.replace(self._session.sharding, marks_padding=marks)
        self._losses: list[torch.Tensor] = []
        self._begin = math.nan
        # Counted before the current step; None between steps, where evaluations send too.
        self._moved_before: torch.Tensor | None = None
        self._clear()

    def _clear(self) -> None:
        self._num_steps, self._moved = 0, torch.zeros(5, dtype=torch.float64)
        # Real tokens and their pairs, all tokens and theirs; on the device if computed there.
        self._counts: list[Any] = [0, 0, 0, 0]

    @functools.cached_property
    def _flops(self) -> StepFlops | None:
        # Read in the first forward: checkpointing may be enabled after the engine is built.
        return step_flops(ModelSpec(self._engine.module))

    @contextlib.contextmanager
    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """Run a forward inside; count the tokens of what is trained on."""
        if math.isnan(self._begin):
            self._begin = time.perf_counter()
        trains = self._engine.module.training and torch.is_grad_enabled()
        if trains and self._moved_before is None:
            self._moved_before = self._moved_so_far()
        yield
        if trains:
            self._count(args, kwargs)

    def add_loss(self, scaled: torch.Tensor) -> None:
        """Add the loss of a backward, scaled as its gradient is, to those of the step."""
        self._losses.append(scaled.detach())

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Run the engine's step inside; report when it is due."""
        before = self._engine.global_steps
        due = (before + 1) % self._every == 0
        # The scheduler advances within the call.
        rate = next(map(float, self._engine.get_lr()), None) if due else None
        try:
            yield
        except NonFiniteLossError:  # the step was dropped; the program may continue
            self._losses, self._moved_before = [], None
            raise
        if self._engine.global_steps == before:
            return
        self._num_steps += 1
        if self._moved_before is not None:
            self._moved, self._moved_before = self._moved + self._moved_so_far() - self._moved_before, None
        if due:
            self._write(rate)
        self._losses = []

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        tokens = next((each for each in given if isinstance(each, torch.Tensor) and each.dim() > 1), None)
        if tokens is None:
            return
        if self._session is not None and self._session.splits_decoder:
            tokens = tokens[:, : self._session.shard_length(tokens.shape[1])]
        real_Bs = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        if self._session is None:
            real_Bs, places_Bs, padded_Bs = whole_places(real_Bs, kwargs)
        else:
            calls = self._session.calls
            # Of the part that is split, which may have more tokens than the model is given: a soft prompt's.
            real_Bs = real_Bs if calls.real_tokens is None else calls.real_tokens
            places_Bs = padded_Bs = shard_places(real_Bs, calls.documents, self._session.groups.sp_rank)
        pairs = self._flops.pairs if self._flops else torch.zeros_like
        more = [real_Bs.sum(), (pairs(places_Bs) * real_Bs).sum(), real_Bs.numel(), pairs(padded_Bs).sum()]
        self._counts = [before + each for before, each in zip(self._counts, more, strict=True)]

    def _write(self, rate: float | None) -> None:
        real, real_pairs, tokens, pairs = map(float, self._counts)  # the first read synchronizes with the device
        flops = [self._flops.model(real, real_pairs), self._flops.alst(tokens, pairs)] if self._flops else [0.0, 0.0]
        loss = float(sum(each.double() for each in self._losses)) if self._losses else math.nan
        accelerator = get_accelerator()
        # On CPU DeepSpeed's accelerator reports host memory. ru_maxrss is in KiB.
        device_peak = 0 if accelerator.device_name() == "cpu" else accelerator.max_memory_allocated()
        host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        numbers = [loss, real, tokens, *flops, *self._moved.tolist(), device_peak, host_peak]
        mine = torch.tensor([numbers], dtype=torch.float64)
        group = self._engine.alst_features.control_group
        everyone = mine.new_empty(dist.get_world_size(group), len(numbers))
        dist.all_gather_single(everyone, mine, group=group)
        end = time.perf_counter()
        if dist.get_rank() == 0:
            # A program may have called no forward of the engine.
            report = self._report(everyone, math.inf if math.isnan(self._begin) else end - self._begin, rate)
            if self._prints:
                print(report.line(self._engine.global_steps), file=sys.stderr, flush=True)
            # By samples, as DeepSpeed's own events: some monitors reject a step that decreases.
            samples = self._engine.global_samples
            self._engine.monitor.write_events([(*each, samples) for each in report.events().items()])
        self._clear()
        self._begin = end

    def _report(self, everyone: torch.Tensor, seconds: float, rate: float | None) -> Report:
        engine, session, steps = self._engine, self._session, self._num_steps
        loss, real, tokens, of_model, of_alst, sent, to_host, to_disk, overflows, *_ = everyone.mean(0).tolist()
        *_, waited, device_peak, host_peak = everyone.amax(0).tolist()
        norm, offloads = engine.get_global_grad_norm(), hasattr(engine, "alst_offload")
        return Report(
            loss=loss if self._losses else None,
            # A skipped step has no gradient norm.
            grad_norm=float(norm) if norm is not None and engine.was_step_applied() else None,
            lr=rate,
            tokens_per_second=real * len(everyone) / seconds,
            padding_share=1 - real / tokens if tokens else 0.0,
            model_flops_per_second=of_model / seconds if self._flops else None,
            hardware_flops_per_second=of_alst / seconds if self._flops else None,
            peak_device_bytes=device_peak or None,
            peak_host_bytes=host_peak,
            wire_bytes=session.reduction_bytes + sent / steps if session is not None else None,
            offload_host_bytes=to_host / steps if offloads else None,
            offload_disk_bytes=to_disk / steps if offloads else None,
            offload_overflows=overflows / steps if offloads and engine.alst_offload.packs else None,
            offload_wait_seconds=waited / steps if offloads else None,
        )

    def _moved_so_far(self) -> torch.Tensor:
        """Return this rank's bytes sent, offloaded to host and to disk, overflows, and seconds waited for the disk."""
        sent = 0 if self._session is None else sent_bytes(self._session.groups.sp_group)
        to_host, to_disk, overflows, waited = 0, 0, 0, 0.0
        if (store := getattr(self._engine, "alst_offload", None)) is not None:
            to_disk, overflows = store.counts.bytes_to_disk, store.counts.overflows
            to_host = store.counts.bytes_out - to_disk
            waited = store.swapper.seconds_waited if store.swapper is not None else 0.0
        return torch.tensor([sent, to_host, to_disk, overflows, waited], dtype=torch.float64)


def _rate(flops: float) -> str:
    return f"{flops / 1e12:,.1f} TFLOP/s" if flops >= 1e12 else f"{flops / 1e9:,.1f} GFLOP/s"


def shard_places(tokens_Bs: torch.Tensor, documents: tuple[int, ...], sp_rank: int) -> torch.Tensor:
    """Return the place in its document of each token of a shard, given the bounds of packed documents."""
    B, s = tokens_Bs.shape
    places_s = torch.arange(sp_rank * s, (sp_rank + 1) * s, device=tokens_Bs.device)
    if documents:
        # No synchronization: the forward may still run on the device.
        bounds_N = torch.tensor(documents).to(places_s.device, non_blocking=True)
        places_s = places_s - bounds_N[torch.searchsorted(bounds_N, places_s, right=True) - 1]
    return places_s.expand(B, s)


def whole_places(tokens_BS: torch.Tensor, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the real tokens of whole sequences, their places in their documents, and places counting padding too."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    real_BS = mask != 0 if isinstance(mask, torch.Tensor) and mask.shape == tokens_BS.shape else tokens_BS
    if positions is None:
        padded_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        return real_BS, real_BS.cumsum(1) - 1, padded_BS
    # They restart at packed documents. Multi-dimensional ones, [3, B, S], have the text's first.
    places_BS = (positions[0] if positions.dim() == 3 else positions).expand(len(tokens_BS), -1)
    return real_BS, places_BS, places_BS

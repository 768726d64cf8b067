"""A few layers on the device: errors of memory-lean layers, their peak beside ``ds_alst plan``'s, and offload's copies.

Legend: n bytes of a tensor.
"""

import copy
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers.utils import is_flash_attn_2_available

from benchmarks.figures import Figure
from benchmarks.gpu import LEAN, TILES
from benchmarks.gpu.jobs import guarded
from benchmarks.gpu.scale import MIB, Scale, batch_of, copy_stream, model_of, step_seconds, synchronize, system_on
from benchmarks.kernels.judge import SLACK, errors_of
from benchmarks.memory import host_store
from benchmarks.tiles.shapes import Shape
from deepspeed_alst.cli.memory import Machine, plan_of, static_bytes
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.offload.host_buffers import CopyStream
from deepspeed_alst.profiler.ledger import Ledger

OF_PLAN = 0.1
"""Largest relative difference of the plan from the peak."""
HIDDEN, SLOWER = 0.9, 1.1
"""Least share of the copies' time behind computation, and the most time of a step, relative to one without."""


def errors(scale: Scale) -> Iterator[Figure]:
    """Yield errors of loss and gradients against fp64, beside those of the ordinary path in the same dtype."""
    cores = ["sdpa"] + ["flash_attention_2"] * (scale.on_gpu and is_flash_attn_2_available())
    for dtype in scale.dtypes:
        for core in cores:
            yield from guarded(f"{LEAN}, {core}", _errors, scale, dtype, core)


def _errors(scale: Scale, dtype: torch.dtype, core: str) -> Iterator[Figure]:
    shape = replace(scale.shape, num_layers=2, keys={**scale.shape.keys, "vocab_size": 512})
    model, batch = model_of(scale, shape, dtype), batch_of(scale, scale.parity_tokens)
    truth = _run(copy.deepcopy(model).double(), batch)
    model.set_attn_implementation(core)
    same = _run(model, batch)
    lean = scale.lean.model_copy(update={"chunk_tokens": scale.parity_tokens // 4 + 1})
    with system_on(scale, LEAN, model, lean=lean) as step:
        got = _run(model, batch, step)
    found = errors_of(list(truth), got.values(), same.values(), truth.values())
    worst = max(found, key=lambda each: found[each][0] / (found[each][1] or 1.0))
    ours, theirs = (_rms(each, truth) for each in (got, same))
    text = f"rms {ours / theirs:.2f} of the ordinary path's {theirs:.1e}; {worst}: {found[worst][0]:.1e}"
    met = all(error <= most for error, most in found.values())
    name = f"{LEAN}, {core}, {scale.parity_tokens} tokens, {dtype}: loss and gradients"
    yield Figure(name, (text,), f"each <= {SLACK:g} x and rounding", met)


def _run(model: Any, batch: dict[str, torch.Tensor], step: Any = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = step(batch) if step else model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: param.grad.clone() for name, param in model.named_parameters()}


def _rms(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Return the root of the mean squared relative error of the gradients."""
    parts = [float((found[name] - each).norm() / each.norm()) ** 2 for name, each in truth.items() if each.dim()]
    return math.sqrt(statistics.mean(parts))


def peak(scale: Scale) -> Iterator[Figure]:
    """Yield the peak of a step beside weights and gradients, and the plan's."""
    shape = replace(scale.shape, num_layers=2)
    model, batch = model_of(scale, shape, torch.bfloat16), batch_of(scale, scale.tokens)
    with PatchSet() as undo:
        store = host_store(undo, copy_stream(scale))
        step = undo.enter_context(system_on(scale, LEAN, model, lean=scale.peak_lean, store=store))
        step(batch).backward()  # its patches set themselves up
        model.zero_grad()
        store.pool.set_sizes(())  # for a ledger on CPU to see buffers as the host's
        synchronize(scale)
        if scale.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        with Ledger(model) as ledger:
            step(batch).backward()
    at_peak = max(ledger.timeline, key=lambda sample: sample.total)
    states = at_peak.bytes["weights"] + at_peak.bytes["gradients"]
    planned = _planned(scale, shape)
    found = (torch.cuda.max_memory_allocated() if scale.on_gpu else at_peak.total) - states
    by_ledger = at_peak.total - states
    text = f"{found / MIB:,.1f} MiB; plan {planned / MIB:,.1f}, ledger of the same step {by_ledger / MIB:,.1f}"
    name = f"peak of {LEAN}, 2 layers, {scale.tokens:,} tokens"
    yield Figure(name, (text,), f"plan within {OF_PLAN:.0%}", abs(planned / found - 1) <= OF_PLAN)


def _planned(scale: Scale, shape: Shape) -> float:
    """Return the bytes of ``ds_alst plan`` for the step, without those that do not depend on the sequence."""
    alst = {
        "activation_checkpoint_cpu_offload": True,
        "save_attention_output": True,
        "memory_lean_layer": scale.peak_lean.model_dump(),
        "tiled_mlp_compute": True,
        "tiled_logits_loss": scale.loss.model_dump(exclude_defaults=True) or True,
        "liger_kernel": "auto" if scale.on_gpu else False,
    }
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0}, "alst": alst}
    machine = Machine(1, 2.0**60, 2.0**60, 1)
    measured = shape.measured(ds_config)
    states, _ = static_bytes(measured[0], ds_config, machine)
    device = plan_of(*measured, ds_config, machine, scale.tokens).device
    # A ledger on CPU does not see what a kernel allocates.
    left_out = {*states, *(() if scale.on_gpu else ("attention kernel's workspace",))}
    return sum(size for name, size in device.items() if name not in left_out)


class TimedCopies(CopyStream):
    """Copies with events around each, and around the computation's waits for them."""

    def __init__(self) -> None:
        super().__init__(torch.cuda, torch.device("cuda"))
        self.copies: list[tuple[Any, Any]] = []
        self.waits: list[tuple[Any, Any]] = []

    def start(self, source_n: torch.Tensor, target_n: torch.Tensor) -> Any:
        """Copy as the base does."""
        self._stream.wait_stream(torch.cuda.current_stream())  # before the copy's time begins
        begin = _event(self._stream)
        done = super().start(source_n, target_n)
        self.copies.append((begin, _event(self._stream)))
        return done

    def wait(self, done: Any) -> None:
        """Wait as the base does."""
        begin = _event(torch.cuda.current_stream())
        super().wait(done)
        self.waits.append((begin, _event(torch.cuda.current_stream())))


def _event(stream: Any) -> Any:
    return stream.record_event(torch.cuda.Event(enable_timing=True))


def _seconds(spans: list[tuple[Any, Any]]) -> float:
    return sum(begin.elapsed_time(end) for begin, end in spans) / 1e3


def offload(scale: Scale) -> Iterator[Figure]:
    """Yield bytes of the copies, the share of their time behind computation, and the time of a step."""
    model, batch = model_of(scale, scale.shape, torch.bfloat16), batch_of(scale, scale.common_tokens)
    copies = TimedCopies() if scale.on_gpu else None
    with system_on(scale, TILES, model, store=None) as step:
        loss = step(batch).detach()
        without = min(step_seconds(scale, model, step, batch) for _ in range(2))
    with PatchSet() as undo:
        store = host_store(undo, copies)
        with system_on(scale, TILES, model, store=store) as step:
            step_seconds(scale, model, step, batch)  # creates the buffers
            out, back = store.counts.bytes_out, store.counts.bytes_back
            for each in (copies.copies, copies.waits) if copies else ():
                each.clear()
            seconds = step_seconds(scale, model, step, batch)
            out, back = store.counts.bytes_out - out, store.counts.bytes_back - back
            copied, stalled = (_seconds(each) for each in (copies.copies, copies.waits)) if copies else (0.0, 0.0)
            same = torch.equal(step(batch), loss)
    sizes, name = scale.shape.keys, f"offload, {scale.shape.num_layers} layers, {scale.common_tokens:,} tokens"
    heads = sizes["num_attention_heads"]
    a_token = 2 * sizes["hidden_size"] + 2 * heads * sizes["head_dim"] + 4 * heads  # input, attention's output, lse
    exact = (scale.shape.num_layers - 1) * scale.common_tokens * a_token
    text = f"{out / MIB:,.1f} MiB to the host, {back / MIB:,.1f} back"
    yield Figure(f"{name}: bytes", (text,), f"{exact / MIB:,.1f} each", out == back == exact)
    yield Figure(f"{name}: loss", ("same bits" if same else "other bits",), "same as without", same)
    text = f"{1e3 * seconds:,.1f} ms, {1e3 * without:,.1f} without"
    if copies is None:
        yield Figure(f"{name}: time of a step", (text,))
        yield Figure(f"{name}: hidden", ("no streams on CPU",))
        return
    yield Figure(f"{name}: time of a step", (text,), f"<= {SLOWER} of it", seconds <= SLOWER * without)
    share = 1 - stalled / copied
    rate = f"{(out + back) / copied / 1e9:,.1f} GB/s"
    text = f"{share:.2f} of {1e3 * copied:,.1f} ms ({rate}), stalls {1e3 * stalled:,.1f} ms"
    yield Figure(f"{name}: copies hidden", (text,), f">= {HIDDEN}", share >= HIDDEN)

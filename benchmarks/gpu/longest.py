"""One system's time at a common length, and the longest sequence that it reaches within a memory limit."""

import gc
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.figures import Figure
from benchmarks.gpu import LIGER, SYSTEMS
from benchmarks.gpu.jobs import guarded
from benchmarks.gpu.scale import GIB, Scale, batch_of, model_of, rates, step_seconds, synchronize, system_on
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.monitoring.step_flops import step_flops
from deepspeed_alst.profiler.ledger import Ledger

_OURS = SYSTEMS[:2]


def rows(scale: Scale, system: str) -> Iterator[Figure]:
    """Yield a system's time and its longest sequence."""
    if system == LIGER and not scale.on_gpu:
        yield Figure(f"{system}: a step", ("its kernels need a GPU",))
        return
    name = f"{scale.model.name}, {system}"
    model = model_of(scale, scale.model, torch.bfloat16)
    yield from guarded(f"{name}: a step", _time, scale, system, name, model)
    yield from guarded(f"{name}: longest", _longest, scale, system, name, model)


def _time(scale: Scale, system: str, name: str, model: torch.nn.Module) -> Iterator[Figure]:
    tokens, (_, rate) = scale.common_tokens, rates(scale)
    flops = step_flops(ModelSpec(model))
    pairs = sum(layers * span.seen_by_all(tokens) for span, layers in flops.spans)
    name = f"{name}: a step of {tokens:,} tokens"
    if not _fits(scale, system, model, tokens):
        yield Figure(name, ("out of memory",), "fits" * (system in _OURS), system not in _OURS)
        return
    with system_on(scale, system, model) as step:
        batch = batch_of(scale, tokens)
        seconds = min(step_seconds(scale, model, step, batch) for _ in range(2))
    share = flops.model(tokens, pairs) / seconds / rate
    yield Figure(name, (f"{tokens / seconds:,.0f} tokens/s, MFU {share:.1%} of the matmul's rate",))


def _longest(scale: Scale, system: str, name: str, model: torch.nn.Module) -> Iterator[Figure]:
    if scale.on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, scale.limit_bytes / total))
    first = scale.common_tokens // 16
    low, high = bisect(lambda tokens: _fits(scale, system, model, tokens, scale.limit_bytes), first, scale.seconds)
    ended = high is None or high - low > max(1, low // 8)
    text = f">= {low:,} tokens, where time ended the search" if ended else f"{low:,} tokens"
    name = f"{name}: longest in {scale.limit_bytes / GIB:.3g} GiB, weights and gradients too"
    yield Figure(name, (text,), "> 0" * (system in _OURS), low > 0 or system not in _OURS)


def bisect(fits: Callable[[int], bool], first: int, seconds: float) -> tuple[int, int | None]:
    """Return the longest length found to fit, and the shortest that does not, within an eighth or the time.

    A length that by the square of the last one's time would end too late is not tried.
    """
    end, low, high, length = time.monotonic() + seconds, 0, None, first
    while True:
        begin = time.monotonic()
        low, high = (length, high) if fits(length) else (low, length)
        following = 2 * low if high is None else (low + high) // 2
        took = (time.monotonic() - begin) * (following / length) ** 2
        if (high is not None and high - low <= max(1, low // 8)) or time.monotonic() + took > end:
            return low, high
        length = following


def _fits(scale: Scale, system: str, model: torch.nn.Module, tokens: int, limit_bytes: int | None = None) -> bool:
    """Return True if a step fits the device, and on CPU by a ledger's peak the limit."""
    model.zero_grad()
    gc.collect()  # what an error's frames held
    if scale.on_gpu:
        torch.cuda.empty_cache()
    try:
        with system_on(scale, system, model) as step:
            if scale.on_gpu or limit_bytes is None:
                step(batch_of(scale, tokens)).backward()
                synchronize(scale)
                return True
            with Ledger(model) as ledger:
                step(batch_of(scale, tokens)).backward()
            return ledger.peak.bytes <= limit_bytes
    except torch.OutOfMemoryError:
        return False

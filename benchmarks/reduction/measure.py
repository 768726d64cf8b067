"""Measurements of all systems on one case, per rank: bytes on the wire, errors, extra memory, times."""

import contextlib
import functools
import gc
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.reduction.engines import BASELINE, SYSTEMS, Case, around_reductions, backward, build, gradients
from benchmarks.tally import Collective, Tally


@dataclass(frozen=True)
class Traffic:
    """Reductions of one system over a step."""

    collectives: list[Collective]
    error: float
    """Largest error of a parameter's averaged gradient against fp64, relative to its norm."""
    num_different: int
    """Elements of the averaged gradients that differ from DeepSpeed's fp32 sum in any bit."""
    worst_difference: float
    """Largest difference of an element, relative to the RMS of its parameter's gradient."""


def traffic(case: Case) -> dict[str, Traffic]:
    """Return each system's collectives and gradients of one step."""
    found, truth = {}, _truth(case)
    baseline: list[torch.Tensor] = []
    for name, system in SYSTEMS.items():
        engine, tally = build(case, system), Tally()
        around_reductions(engine, lambda tally=tally: tally.phase("reduction"))
        with tally.installed():
            averaged = _step(engine, case)
        engine.destroy()
        baseline = averaged if name == BASELINE else baseline
        errors = [(own.double() - true).norm() / true.norm() for own, true in zip(averaged, truth, strict=True)]
        pairs = list(zip(averaged, baseline, strict=True))
        different = sum(int((own != theirs).sum()) for own, theirs in pairs)
        worst = max(float((own - theirs).abs().max() / theirs.square().mean().sqrt()) for own, theirs in pairs)
        found[name] = Traffic(tally.of("reduction"), float(max(errors)), different, worst)
    return found


def wire_bytes(ranks: list[list[Collective]]) -> int:
    """Sum the bytes of sequential collectives, each counted by its busiest rank."""
    return sum(max(each.busiest for each in one) for one in zip(*ranks, strict=True))


def _step(engine: Any, case: Case) -> list[torch.Tensor]:
    """Return the averaged gradients of all micro-steps."""
    from deepspeed.utils import safe_get_full_grad

    for micro_step in range(case.gas):
        backward(engine, case, micro_step)
        if micro_step + 1 < case.gas:
            engine.step()
    return [safe_get_full_grad(param).clone() for param in engine.module.parameters()]


def _truth(case: Case) -> list[torch.Tensor]:
    """Return the averages in fp64."""
    places = itertools.product(range(case.world_size), range(case.gas))
    of_all = zip(*(gradients(case, *place) for place in places), strict=True)
    return [torch.stack(of_param).double().mean(0) for of_param in of_all]


def extra_bytes(case: Case) -> dict[str, int]:
    """Return each system's peak bytes of a reduction beyond live memory, in the second micro-step or later.

    Buffers that DeepSpeed creates in the first one and keeps count as gradients, not as the reduction's.
    """
    found = {}
    for name, system in SYSTEMS.items():
        engine, peaks = build(case, system), [0]
        backward(engine, case, 0)
        engine.step()
        lived = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
        around_reductions(engine, functools.partial(allocated, engine, lived, peaks))
        backward(engine, case, 1)
        engine.destroy()
        del engine
        found[name] = max(peaks)
    return found


@contextlib.contextmanager
def allocated(engine: Any, lived: list[torch.Tensor], peaks: list[int]) -> Iterator[None]:
    """Append the peak bytes inside the block beyond the bytes live before, by the ledger."""
    from deepspeed_alst.profiler.ledger import Ledger

    # Newer than ``lived``: gradients, and the buckets, which stages 1 and 2 recreate in each backward.
    buffers = [bucket.buffer for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values()]
    new = [each for buffer in buffers for each in (buffer if isinstance(buffer, list) else [buffer])]
    new += [getattr(engine.optimizer, "grads_in_partition", None)]
    new += [each for param in engine.module.parameters() for each in (param.grad, getattr(param, "grad_accum", None))]
    with Ledger(engine.module) as ledger:
        ledger.claim([*lived, *(each for each in new if isinstance(each, torch.Tensor))], "other")
        yield
    totals = [sample.total for sample in ledger.timeline]
    peaks.append(max(totals) - totals[0])


def seconds(case: Case, rounds: int) -> list[dict[str, float]]:
    """Return each system's seconds in a step's reductions per round; systems alternate, after a warm-up round."""
    clocks: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    engines = {name: build(case, system) for name, system in SYSTEMS.items()}
    for name, engine in engines.items():
        around_reductions(engine, functools.partial(_clock, clocks[name]))
    found = []
    for _ in range(1 + rounds):
        for name, engine in engines.items():
            clocks[name].clear()
            for micro_step in range(case.gas):
                backward(engine, case, micro_step)
                engine.step()
        found.append({name: sum(clock) for name, clock in clocks.items()})
    for engine in engines.values():
        engine.destroy()
    return found[1:]


@contextlib.contextmanager
def _clock(times: list[float]) -> Iterator[None]:
    dist.barrier()  # exclude the wait for slower ranks
    begin = time.perf_counter()
    yield
    times.append(time.perf_counter() - begin)

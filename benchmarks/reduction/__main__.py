"""Gradient reduction against DeepSpeed 0.19.8: bytes on the wire, memory, errors, times; the local sum.

    python -m benchmarks.reduction [part ...]

Parts are wire, memory, error, time and op; default: all. A bf16 model with a few parameters, one larger than the
bucket, data parallel on 2 and 4 gloo ranks. The exit status is non-zero if a target is missed.
"""

import functools
import itertools
import statistics
import sys
from collections.abc import Iterator

from benchmarks.figures import Figure, Part, report
from benchmarks.ranks import Ranks
from benchmarks.reduction import op
from benchmarks.reduction.engines import BASELINE, OURS, SYSTEMS, Case, cases
from benchmarks.reduction.measure import Traffic, extra_bytes, seconds, traffic, wire_bytes

SMALL = {
    "sizes": (4099, 30, 12000, 1, 7001, 300007, 2048, 9973, 100000, 65537),
    "bucket": 120_000,
    "slice_bytes": 1 << 16,
}
# Scale of DeepSpeed's default bucket, of a smaller one that saves memory, and of the default slice.
SCALE = 1024
BUCKETS = (125_000_000 // SCALE, 500_000_000 // SCALE)
SLICE_BYTES = 2**26 // SCALE
LARGE_SIZES = (50_001, 37_500, 512_503, 77, 62_500, 43_753, 1, 56_250, 31_251, 75_000)
ROUNDS = 5
_KIB = 1024
# Bytes of scalars, such as a loss scale.
_NUMBERS = 256

# Limit relative to DeepSpeed's fp32 bytes, if not one half.
_MOST = {(2, "fp32"): 0.75}
# Relative to the RMS of the gradient: a different rank order changes the last bits of fp32 sums.
_FP32_ROUNDING = 2**-22

_WIRE = (
    "Bytes an element of the gradients, of one reduction of all of them: for each collective what its busiest rank "
    "sends or receives, whichever is more, added up. All-reduce, all-gather and reduce-scatter as rings, 2 (P-1)/P of "
    "the buffer for the first and (P-1)/P for the others; an all-to-all's real splits; nothing for a rank's share for "
    "itself. DeepSpeed sums with communication_data_type, on the path of its SP runs: a bucket's all-reduce at stages "
    "0, 1 and 2, its reduce-scatter at stage 3."
)
_MEMORY = (
    "KiB by which a reduction raises what lives, by this package's ledger; gradients and buckets live before, and what "
    f"gloo copies within a collective is not in it. All sizes are 1/{SCALE} of real ones, for the time it takes: "
    "buckets of 1.25e8 and 5e8 elements, slices of 64 MiB, one parameter of 5.2e8. No bucket is kept at stage 0, and "
    "at stage 1 with fp32: the number is where DeepSpeed cuts the gradients there."
)
_ERROR = (
    "Of the worst parameter's averaged gradient after a step, relative to the average in fp64 of the ranks' own bf16 "
    "gradients, and how many elements are not those of DeepSpeed's fp32 sum. Accumulation in bf16 rounds for all alike."
)
_TIME = (
    f"Seconds inside the reductions of a step, of the slowest rank, as a ratio to DeepSpeed's fp32: the median of "
    f"{ROUNDS} rounds in which the systems take turns. gloo over loopback: no network's bandwidth, for information."
)


def wire() -> Iterator[Figure]:
    """Yield bytes on the wire."""
    numel = sum(SMALL["sizes"])
    for case, found in _traffics((1,)):
        sent = {name: wire_bytes([of_rank[name].collectives for of_rank in found]) / numel for name in SYSTEMS}
        most = _MOST.get((case.stage, case.accumulation), 0.5)
        # Three digits: unevenly split slices are padded by less than an element per rank.
        ratio = round(sent[OURS] / sent[BASELINE], 3)
        texts = (f"{sent[name]:.2f}, {sent[name] / sent[BASELINE]:.3f} of it" for name in SYSTEMS if name != BASELINE)
        yield Figure(case.name, (f"{sent[BASELINE]:.2f}", *texts), f"<= {most:.2f} of it", ratio <= most)


def memory() -> Iterator[Figure]:
    """Yield peak memory."""
    target = f"<= {2 * SLICE_BYTES / _KIB:,.0f}, two slices"
    for world_size, bucket in itertools.product((2, 4), BUCKETS):
        with Ranks(world_size) as ranks:
            for case in cases((world_size,), (2,), sizes=LARGE_SIZES, bucket=bucket, slice_bytes=SLICE_BYTES):
                found = ranks.run(extra_bytes, case)
                most = {name: max(of_rank[name] for of_rank in found) for name in SYSTEMS}
                met = all(most[name] <= 2 * SLICE_BYTES + _NUMBERS for name in SYSTEMS if SYSTEMS[name].ours)
                texts = tuple(f"{most[name] / _KIB:,.1f}" for name in SYSTEMS)
                yield Figure(f"{case.name}, bucket {bucket:,}", texts, target, met, brief=bucket == BUCKETS[1])


def error() -> Iterator[Figure]:
    """Yield errors against fp64, and differences from DeepSpeed's bits."""
    for case, found in _traffics((1, 4)):
        texts = []
        for name in SYSTEMS:
            worst = max(found, key=lambda of_rank, name=name: of_rank[name].error)[name]
            texts.append(f"{worst.error:.1e}, " + (f"{worst.num_different:,} differ" if worst.num_different else "="))
        met = all(of_rank[OURS].worst_difference <= _FP32_ROUNDING for of_rank in found)
        # Sums of two numbers, and sums exact in fp32, do not depend on the order.
        is_same = not any(of_rank[OURS].num_different for of_rank in found)
        must = case.world_size == 2 or case.accumulation == "bf16"
        target = "=, bit by bit" if must else "= but for fp32 rounding"
        met, brief = is_same if must else met, case.gas > 1
        yield Figure(f"{case.name}, {case.gas} micro-steps", tuple(texts), target, met, brief=brief)


def times() -> Iterator[Figure]:
    """Yield seconds."""
    with Ranks(2) as ranks:
        for case in cases((2,), (1,), sizes=LARGE_SIZES, bucket=BUCKETS[1], slice_bytes=SLICE_BYTES):
            rounds = list(zip(*ranks.run(seconds, case, ROUNDS), strict=True))
            slowest = [{name: max(of_rank[name] for of_rank in one) for name in SYSTEMS} for one in rounds]
            median = {name: statistics.median(one[name] for one in slowest) for name in SYSTEMS}
            ratios = (f"{median[name] / median[BASELINE]:.2f}" for name in SYSTEMS if name != BASELINE)
            yield Figure(case.name, (f"{median[BASELINE] * 1000:.0f} ms", *ratios))


def _traffics(gas: tuple[int, ...]) -> Iterator[tuple[Case, list[dict[str, Traffic]]]]:
    for world_size in (2, 4):
        yield from ((case, found) for case, found in _traffics_of(world_size) if case.gas in gas)


@functools.cache
def _traffics_of(world_size: int) -> list[tuple[Case, list[dict[str, Traffic]]]]:
    """Run each case on all ranks; the wire and error parts share the results."""
    with Ranks(world_size) as ranks:
        return [(case, ranks.run(traffic, case)) for case in cases((world_size,), (1, 4), **SMALL)]


PARTS = {
    "wire": Part(wire, tuple(SYSTEMS), _WIRE),
    "memory": Part(memory, tuple(SYSTEMS), _MEMORY),
    "error": Part(error, tuple(SYSTEMS), _ERROR),
    "time": Part(times, tuple(SYSTEMS), _TIME),
    "op": Part(op.rows),
}

if __name__ == "__main__":
    sys.exit(report(__doc__, PARTS))

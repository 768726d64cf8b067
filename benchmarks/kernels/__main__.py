"""Kernels without a GPU: resources per chip, bytes moved, errors and memory.

    python -m benchmarks.kernels [part ...]

Parts are compile, numbers and memory; default: all. The exit status is non-zero if a target is missed. Their times on a
GPU are a part of ``make gpu`` (benchmarks/gpu).
"""

import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.figures import Figure, Part, report
from benchmarks.kernels.compile import SHARED, Compiled, compile_all
from benchmarks.kernels.cross_entropy import tile_peak, upstreams_bytes_a_logit
from benchmarks.kernels.gated import mlp_peak
from benchmarks.kernels.judge import Interpreted, subjects, title
from benchmarks.tiles.shapes import REAL_SIZE, step_of
from benchmarks.tiles.systems import NORMS_AND_ROPE, System

_TILE_TOKENS = 523  # the torch backend's tile of 1 GiB
_TOKENS, _VOCABULARY = 32768, 128256

_COMPILE = (
    "Compiled ahead of time by the wrappers that launch them, on tensors without data; run on none of these chips. "
    "Registers of a thread; shared memory of a block in bytes; spills in bytes on NVIDIA, in registers on AMD."
)
_NUMBERS = (
    "Run by Triton's interpreter on CPU, against fp64: of all results and metrics the one nearest to what it may be, "
    "which is thrice torch's own error in the same dtype, and one rounding. Bytes an element are those of all loads "
    "and stores of a launch; the least is what must be moved."
)
_MEMORY = (
    "Peaks beside the weights, gradients in them, of 32,768 tokens on fake tensors: of Llama-3.1-8B's head, of models "
    "of one checkpointed layer, MLP and loss in tiles, while the layer runs, and of the backward of an MLP."
)


def compiled() -> Iterator[Figure]:
    """Yield registers, shared memory and spills: the most of a kernel's sizes, and each size that does not fit."""
    by_kernel = defaultdict(list)
    for each in compile_all():
        by_kernel[each.kernel, each.target].append(each)
        if not each.fits:
            yield Figure(f"{each.kernel}, {each.target}, {each.size}", resources([each]), "must fit", False)
    for (kernel, target), sizes in by_kernel.items():
        fits = all(each.fits for each in sizes)
        verdict = "" if fits else "see above"
        name = f"{kernel}, {target}, {len(sizes)} launches"
        yield Figure(name, resources(sizes), f"shared <= {SHARED[target]}, 0 spills", verdict=verdict)


def resources(sizes: list[Compiled]) -> tuple[str, ...]:
    """Return the texts of the most registers, shared memory and spills."""
    return tuple(str(max(getattr(each, name) for each in sizes)) for name in ("registers", "shared", "spilled"))


def numbers() -> Iterator[Figure]:
    """Yield errors and memory traffic."""
    process = Interpreted()
    for subject in subjects():
        for case in subject.CASES:
            verdict = process.run(subject.judge, case)
            name = f"{subject.__name__.rsplit('.', 1)[-1]} {title(case)}"
            error, most = verdict.errors[verdict.worst]
            figures = (verdict.worst, f"{error:.1e} of {most:.1e}", f"{verdict.moved:.3f}")
            met = verdict.is_accurate and verdict.is_lean
            yield Figure(name, figures, f"all errors; <= 1.1 x {verdict.least:.3f}", met)
    moved = process.run(upstreams_bytes_a_logit, 3, 128256)
    yield Figure("DeepSpeed's chunked cross-entropy [3, 128256] bfloat16", ("", "", f"{moved:.3f}"))
    process.close()


def memory() -> Iterator[Figure]:
    """Yield memory peaks with and without the kernels."""
    process = Interpreted()
    by_torch = process.run(tile_peak, "torch", _TILE_TOKENS)
    for tokens in (_TILE_TOKENS, None):
        peak = process.run(tile_peak, "triton", tokens)
        words = f"loss, tiles of {tokens} tokens" if tokens else "loss, tiles of 1 GiB: 2,092 tokens, torch's have 523"
        most = 0.95 if tokens else 1.02
        figures = f"{by_torch / 2**30:.2f} GiB", f"{peak / 2**30:.2f} GiB"
        yield Figure(words, figures, f"<= {most} of torch's", peak <= most * by_torch)
    process.close()
    whole = f"{2 * 2 * _TOKENS * _VOCABULARY / 2**30:.2f} GiB"
    yield Figure("loss, DeepSpeed's chunked on whole logits, computed", ("", whole))
    for name, model_type in (("Llama-3.1-8B", "llama"), ("Qwen3-32B", "qwen3")):
        own = layer_peak(model_type, False)
        for parts, liger in (("norms and rotary embedding", NORMS_AND_ROPE), ("SwiGLU too", True)):
            peak = layer_peak(model_type, liger)
            figures = f"{own / 1024:.0f} KiB a token", f"{peak / 1024:.0f} KiB a token"
            yield Figure(f"a layer of {name}, Liger's {parts}", figures, "<= 0.8 of torch's", peak <= 0.8 * own)
    for rows, most in ((mlp_peak(closed=False)[0], 1.57), (mlp_peak(closed=True)[0], 1.78)):
        by_autograd, peak = (mlp_peak(closed=each, tile_tokens=rows)[1] / 2**30 for each in (False, True))
        figures = f"{by_autograd:.2f} GiB", f"{peak:.2f} GiB"
        met = peak <= min(most, by_autograd)
        yield Figure(f"MLP, tiles of {rows:,} tokens", figures, f"<= {most} GiB, and autograd's", met)


def layer_peak(model_type: str, liger: Any) -> float:
    """Return peak bytes per token of a checkpointed layer, with tiled MLP and loss, of a model of ``REAL_SIZE``."""
    shape = next(each for each in REAL_SIZE if each.model_type == model_type)
    ledger = step_of(dataclasses.replace(shape, num_layers=1), 1, System("ours", "non-reentrant", liger)).ledger
    in_layer = [each for each in ledger.timeline if each.moment.module.startswith("model.layers.")]
    return max(each.total - each.bytes["weights"] for each in in_layer) / shape.tokens


PARTS = {
    "compile": Part(compiled, ("registers", "shared", "spilled"), _COMPILE),
    "numbers": Part(numbers, ("worst result", "its error", "bytes an element"), _NUMBERS),
    "memory": Part(memory, ("torch", "kernels"), _MEMORY),
}

if __name__ == "__main__":
    try:
        sys.exit(report(__doc__, PARTS))
    except TimeoutError as late:
        sys.exit(str(late))

"""Kernels without a GPU: resources per chip, bytes moved, errors and memory.

    python -m benchmarks.kernels [part ...]

Parts are compile, numbers, memory and gpu (if there is one); default: all. The exit status is non-zero if a
target is missed.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.compile import SHARED, compile_all
from benchmarks.kernels.cross_entropy import tile_peak, upstreams_bytes_a_logit
from benchmarks.kernels.gated import mlp_peak
from benchmarks.kernels.gpu import OF_A_COPY, OF_LIGERS, Sizes, copy_bytes_a_second, launches, seconds_on_gpu
from benchmarks.kernels.judge import Interpreted, subjects
from benchmarks.kernels.liger import NORMS_AND_ROPE, layer_peak
from benchmarks.parts import chosen_parts

Row = tuple[tuple[str, ...], str, bool]
"""Name and figures, the target, and True if it is met."""

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
_GPU = "Medians on the device. Not yet printed on one: every other part runs without."
_MEMORY = (
    "Peaks beside the weights, gradients in them, of 32,768 tokens on fake tensors: of Llama-3.1-8B's head, of models "
    "of one checkpointed layer, MLP and loss in tiles, while the layer runs, and of the backward of an MLP."
)


def compiled() -> Iterator[Row]:
    """Yield registers, shared memory and spills."""
    for each in compile_all():
        figures = (f"{each.registers}", f"{each.shared}", f"{each.spilled}")
        name = f"{each.kernel}, {each.target}, {each.size}"
        yield (name, *figures), f"0 spills, shared <= {SHARED[each.target]}", each.fits


def numbers() -> Iterator[Row]:
    """Yield errors and memory traffic."""
    process = Interpreted()
    for subject in subjects():
        for case in subject.CASES:
            verdict = process.run(subject.judge, case)
            name = f"{subject.__name__.rsplit('.', 1)[-1]} {subject.title(case)}"
            error, most = verdict.errors[verdict.worst]
            figures = (verdict.worst, f"{error:.1e} of {most:.1e}", f"{verdict.moved:.3f}")
            met = verdict.is_accurate and verdict.is_lean
            yield (name, *figures), f"all errors; <= 1.1 x {verdict.least:.3f}", met
    moved = process.run(upstreams_bytes_a_logit, 3, 128256)
    yield ("DeepSpeed's chunked cross-entropy [3, 128256] bfloat16", "", "", f"{moved:.3f}"), "none", True
    process.close()


def memory() -> Iterator[Row]:
    """Yield memory peaks with and without the kernels."""
    process = Interpreted()
    by_torch = process.run(tile_peak, "torch", _TILE_TOKENS)
    for tokens in (_TILE_TOKENS, None):
        peak = process.run(tile_peak, "triton", tokens)
        words = f"loss, tiles of {tokens} tokens" if tokens else "loss, tiles of 1 GiB: 2,092 tokens, torch's have 523"
        most = 0.95 if tokens else 1.02
        figures = f"{by_torch / 2**30:.2f} GiB", f"{peak / 2**30:.2f} GiB"
        yield (words, *figures), f"<= {most} of torch's", peak <= most * by_torch
    process.close()
    whole = f"{2 * 2 * _TOKENS * _VOCABULARY / 2**30:.2f} GiB"
    yield ("loss, DeepSpeed's chunked on whole logits, computed", "", whole), "none", True
    for name, model_type in (("Llama-3.1-8B", "llama"), ("Qwen3-32B", "qwen3")):
        own = layer_peak(model_type, False)
        for parts, liger in (("norms and rotary embedding", NORMS_AND_ROPE), ("SwiGLU too", True)):
            peak = layer_peak(model_type, liger)
            figures = f"{own / 1024:.0f} KiB a token", f"{peak / 1024:.0f} KiB a token"
            yield (f"a layer of {name}, Liger's {parts}", *figures), "<= 0.8 of torch's", peak <= 0.8 * own
    rows, by_autograd = mlp_peak(closed=False)
    for most, (own_rows, peak) in ((0.9, mlp_peak(closed=True, tile_tokens=rows)), (1.05, mlp_peak(closed=True))):
        words = f"MLP, tiles of {own_rows:,} tokens, by autograd of {rows:,}"
        figures = f"{by_autograd / 2**30:.2f} GiB", f"{peak / 2**30:.2f} GiB"
        yield (words, *figures), f"<= {most} of autograd's", peak <= most * by_autograd


def gpu() -> Iterator[Row]:
    """Yield times of the kernels on a GPU."""
    if not torch.cuda.is_available():
        yield ("no GPU here: nothing is timed", "", "", ""), "", True
        return
    bytes_a_second = copy_bytes_a_second(seconds_on_gpu)
    for each in launches("cuda", Sizes()):
        seconds = seconds_on_gpu(each.run)
        of_copy = each.moved / seconds / bytes_a_second
        of_ligers = seconds / seconds_on_gpu(each.ligers) if each.ligers else None
        met = of_copy >= OF_A_COPY and (of_ligers is None or of_ligers <= OF_LIGERS)
        texts = (f"{1e3 * seconds:.3f} ms", f"{of_copy:.2f}", "" if of_ligers is None else f"{of_ligers:.2f}")
        yield (each.name, *texts), f">= {OF_A_COPY} of a copy, <= {OF_LIGERS} x Liger's", met


PARTS: dict[str, tuple[Callable[[], Iterator[Row]], tuple[str, ...], str]] = {
    "compile": (compiled, ("registers", "shared", "spilled"), _COMPILE),
    "numbers": (numbers, ("worst result", "its error", "bytes an element"), _NUMBERS),
    "memory": (memory, ("torch", "kernels"), _MEMORY),
    "gpu": (gpu, ("seconds", "of a copy's bytes a second", "times Liger's"), _GPU),
}


def main() -> int:
    """Print a table for each part; return 1 if a target is missed."""
    started, missed, console = time.monotonic(), 0, Console(width=160)
    for name in chosen_parts(__doc__, PARTS):
        rows, columns, caption = PARTS[name]
        table = Table(title=name, caption=caption, title_justify="left", caption_justify="left")
        for column in ("", *columns, "target", "verdict"):
            table.add_column(column)
        for texts, target, met in rows():
            missed += not met
            table.add_row(*texts, target, "ok" if met else "MISSED")
        console.print(table)
    console.print(f"{missed} targets missed; {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TimeoutError as late:
        sys.exit(str(late))

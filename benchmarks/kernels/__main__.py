"""The Triton kernels without a GPU: what they take of each chip, the bytes they move, and their errors.

    python -m benchmarks.kernels [part ...]

Parts are compile, numbers and memory; all if none is named. Exits non-zero where a target is missed.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernels.compile import SHARED, compile_all
from benchmarks.kernels.judge import Case, Interpreted, judge, tile_peak
from benchmarks.parts import chosen_parts

Row = tuple[tuple[str, ...], str, bool]
"""What and its figures, the target, whether it is met."""

CASES = (
    Case(11, 1000, torch.float32),
    Case(3, 50257, torch.float32, label_smoothing=0.1, softcap=30.0, logit_scale=0.7),
    Case(3, 128256, torch.bfloat16),
    Case(3, 50257, torch.bfloat16, label_smoothing=0.1, gap=7),
    Case(3, 151665, torch.bfloat16, softcap=30.0),
    Case(3, 32001, torch.float16, logit_scale=0.7),
)
_TILE_TOKENS = 523  # torch's tile of 1 GiB

_COMPILE = (
    "Compiled ahead of time by the wrappers that launch them, on tensors without data; run on none of these chips. "
    "Registers of a thread; shared memory of a block in bytes; spills in bytes on NVIDIA, in registers on AMD."
)
_NUMBERS = (
    "Run by Triton's interpreter on CPU, against fp64; a target is thrice torch's own error in the same dtype, and one "
    "rounding. Bytes a logit are those of all loads and stores of a launch; the least is two reads and a write of it."
)
_MEMORY = "Peak beside the weights, the head's gradient in it, of 32,768 tokens on fake tensors: Llama-3.1-8B's head."


def compiled() -> Iterator[Row]:
    """Registers, shared memory and spills."""
    for each in compile_all():
        figures = (f"{each.registers}", f"{each.shared}", f"{each.spilled}")
        yield (f"{each.target}, {each.size}", *figures), f"0 spills, shared <= {SHARED[each.target]}", each.fits


def numbers() -> Iterator[Row]:
    """Errors and traffic."""
    process = Interpreted()
    for case in CASES:
        verdict = process.run(judge, case)
        name = f"[{case.t}, {case.V}] {str(case.dtype).removeprefix('torch.')}"
        flags = ("label_smoothing", "softcap", "logit_scale")
        name += "".join(
            f", {flag} {getattr(case, flag)}" for flag in flags if getattr(case, flag) != getattr(Case, flag)
        )
        errors = tuple(f"{verdict.errors[each][0]:.1e} of {verdict.errors[each][1]:.1e}" for each in _ERRORS)
        met = verdict.is_accurate and verdict.is_lean
        yield (name, *errors, f"{verdict.moved:.3f}"), f"errors; <= 1.1 x {verdict.least:.3f}", met
    process.close()


_ERRORS = ("loss, max", "gradient, max", "gradient, rms")


def memory() -> Iterator[Row]:
    """What one value a logit is worth."""
    process = Interpreted()
    by_torch = process.run(tile_peak, "torch", _TILE_TOKENS)
    for tokens in (_TILE_TOKENS, None):
        peak = process.run(tile_peak, "triton", tokens)
        words = f"tiles of {tokens} tokens" if tokens else "tiles of 1 GiB: 2,092 tokens, torch's have 523"
        most = 0.95 if tokens else 1.02
        figures = f"{by_torch / 2**30:.2f} GiB", f"{peak / 2**30:.2f} GiB"
        yield (words, *figures), f"<= {most} of torch's", peak <= most * by_torch
    process.close()


PARTS: dict[str, tuple[Callable[[], Iterator[Row]], tuple[str, ...], str]] = {
    "compile": (compiled, ("registers", "shared", "spilled"), _COMPILE),
    "numbers": (numbers, (*_ERRORS, "bytes a logit"), _NUMBERS),
    "memory": (memory, ("torch", "triton"), _MEMORY),
}


def main() -> int:
    """Print a table for each part; 1 where a target is missed."""
    started, missed, console = time.monotonic(), 0, Console(width=160)
    for name in chosen_parts(__doc__, PARTS):
        rows, columns, caption = PARTS[name]
        table = Table(title=f"cross-entropy: {name}", caption=caption, title_justify="left", caption_justify="left")
        for column in ("", *columns, "target", "verdict"):
            table.add_column(column)
        for texts, target, met in rows():
            missed += not met
            table.add_row(*texts, target, "ok" if met else "MISSED")
        console.print(table)
    console.print(f"{missed} targets missed; {time.monotonic() - started:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

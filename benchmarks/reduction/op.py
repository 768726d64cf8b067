"""Local sum of a gradient reduction against plain torch: time, memory and bandwidth on one thread.

8 pieces of 4 Mi elements; medians of interleaved rounds, so that load on the machine affects all alike.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.figures import Figure, in_turns, one_thread
from benchmarks.ranks import finished
from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces
from deepspeed_alst.kernels.builder import load

NUM_PIECES, NUM_ELEMENTS = 8, 4 << 20
ROUNDS = 11
MIB = 1 << 20


def plain(pieces_Pn: torch.Tensor) -> torch.Tensor:
    """Sum pieces in plain torch."""
    return torch.stack(list(pieces_Pn)).float().sum(0)


def speed(dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[float, float]:
    """Return the speedup over plain torch, and the share of a copy's bandwidth (bytes read and written)."""
    pieces_Pn, out_n = torch.randn(NUM_PIECES, NUM_ELEMENTS).to(dtype), torch.empty(NUM_ELEMENTS, dtype=out_dtype)
    source, target = torch.ones(128 * MIB // 4), torch.ones(128 * MIB // 4)  # far larger than any cache
    functions = {
        "op": lambda: sum_pieces(pieces_Pn, out_n, 1.0),
        "plain": lambda: plain(pieces_Pn),
        "copy": lambda: target.copy_(source),
    }
    took = in_turns(functions, ROUNDS, time.perf_counter)
    moved = pieces_Pn.nbytes + out_n.nbytes
    return took["plain"] / took["op"], moved / took["op"] / (2 * source.nbytes / took["copy"])


def peak_beyond(name: str) -> int:
    """Return the bytes one sum adds to peak resident memory; needs a fresh process.

    All tensors' pages are resident before, the output's included, and a small sum has loaded all code.
    """
    pieces_Pn = torch.ones(NUM_PIECES, NUM_ELEMENTS, dtype=torch.bfloat16)
    out_n = torch.ones(NUM_ELEMENTS)
    functions = {"op": lambda p_Pn, o_n: sum_pieces(p_Pn, o_n, 1.0), "plain": lambda p_Pn, o_n: plain(p_Pn)}
    functions[name](pieces_Pn[:, :4097], out_n[:4097])
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current resident size
    before = _peak()
    functions[name](pieces_Pn, out_n)
    return _peak() - before


def _peak() -> int:
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(name: str) -> int:
    """Run ``peak_beyond`` in a separate process."""
    program = (
        "import torch; from benchmarks.reduction import op; torch.set_num_threads(1); op.load('cpu'); "
        f"print(op.peak_beyond({name!r}))"
    )
    done = finished([sys.executable, "-c", program], 600.0, stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[-1])


def rows() -> Iterator[Figure]:
    """Yield all figures with their targets."""
    with one_thread():
        words = load("cpu")
        yield Figure("what adds", (words,), "csrc op", words == "csrc op")
        for dtype, out_dtype, least_times, least_share in (
            (torch.bfloat16, torch.float32, 15.0, 0.6),
            (torch.bfloat16, torch.bfloat16, 15.0, 0.5),
            (torch.float16, torch.float32, 10.0, 0.4),
            (torch.float32, torch.float32, 5.0, 0.6),
        ):
            times, share = speed(dtype, out_dtype)
            name, met = f"{NUM_PIECES} pieces, {dtype} to {out_dtype}".replace("torch.", ""), times >= least_times
            yield Figure(f"{name}: times faster than torch", (f"{times:.1f}",), f">= {least_times}", met)
            yield Figure(f"{name}: of a copy's bandwidth", (f"{share:.2f}",), f">= {least_share}", share >= least_share)
    ours, theirs = memory("op"), memory("plain")
    yield Figure("MiB beyond the output", (f"{ours / MIB:.2f}",), "< 0.5", ours < MIB / 2)
    yield Figure("the same of torch, its output included", (f"{theirs / MIB:.0f}",))

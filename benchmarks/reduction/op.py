"""Local sum of a gradient reduction against plain torch: time, memory and bandwidth on one thread.

    python -m benchmarks.reduction.op

8 pieces of 4 Mi elements; medians of interleaved rounds, so that load on the machine affects all alike. The exit status
is non-zero if a target is missed.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import finished
from deepspeed_alst.grad_reduction.sum_pieces import load_sum_pieces, sum_pieces

Row = tuple[str, str, str, bool]
"""Row name, figure, target, and True if it is met."""

NUM_PIECES, NUM_ELEMENTS = 8, 4 << 20
ROUNDS = 11
MIB = 1 << 20


def plain(pieces_Pn: torch.Tensor) -> torch.Tensor:
    """Sum the pieces in plain torch."""
    return torch.stack(list(pieces_Pn)).float().sum(0)


def seconds(**functions: Callable[[], object]) -> dict[str, float]:
    """Return the median time of each function; functions alternate, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(1 + ROUNDS):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def speed(dtype: torch.dtype, out_dtype: torch.dtype) -> tuple[float, float]:
    """Return the speedup over plain torch, and the share of a copy's bandwidth (bytes read and written)."""
    pieces_Pn = torch.randn(NUM_PIECES, NUM_ELEMENTS).to(dtype)
    out_n = torch.empty(NUM_ELEMENTS, dtype=out_dtype)
    source, target = torch.ones(128 * MIB // 4), torch.ones(128 * MIB // 4)  # far larger than any cache
    took = seconds(
        op=lambda: sum_pieces(pieces_Pn, out_n, 1.0), plain=lambda: plain(pieces_Pn), copy=lambda: target.copy_(source)
    )
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
        "import torch; from benchmarks.reduction import op; torch.set_num_threads(1); op.load_sum_pieces('cpu'); "
        f"print(op.peak_beyond({name!r}))"
    )
    done = finished([sys.executable, "-c", program], 600.0, stdout=subprocess.PIPE, check=True)
    return int(done.stdout.split()[-1])


def rows() -> list[Row]:
    """Return all figures with their targets."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        words = load_sum_pieces("cpu")
        found: list[Row] = [("what adds", words, "csrc op", words == "csrc op")]
        for dtype, out_dtype, least_times, least_share in (
            (torch.bfloat16, torch.float32, 15.0, 0.6),
            (torch.bfloat16, torch.bfloat16, 15.0, 0.5),
            (torch.float16, torch.float32, 10.0, 0.4),
            (torch.float32, torch.float32, 5.0, 0.6),
        ):
            times, share = speed(dtype, out_dtype)
            name = f"{NUM_PIECES} pieces, {dtype} to {out_dtype}".replace("torch.", "")
            found.append(
                (f"{name}: times faster than torch", f"{times:.1f}", f">= {least_times}", times >= least_times)
            )
            found.append((f"{name}: of a copy's bandwidth", f"{share:.2f}", f">= {least_share}", share >= least_share))
    finally:
        torch.set_num_threads(threads)
    ours, theirs = memory("op"), memory("plain")
    found.append(("MiB beyond the output", f"{ours / MIB:.2f}", "< 0.5", ours < MIB / 2))
    found.append(("the same of torch, its output included", f"{theirs / MIB:.0f}", "", True))
    return found


def main() -> int:
    """Print the figures; return 1 if a target is missed."""
    found = rows()
    table = Table("figure", "value", "target", "")
    for what, value, target, met in found:
        table.add_row(what, value, target, "" if not target else "met" if met else "MISSED")
    Console(width=120).print(table)
    return int(not all(met for *_, met in found))


if __name__ == "__main__":
    sys.exit(main())

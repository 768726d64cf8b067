"""Resident memory per token, and bytes on disk: the inputs of many layers pass through the store.

Without a model: each of 32 layers offloads and frees a tensor of n tokens, and the backward fetches all of them.
Resident memory is that of the process at the end of the forward; each length runs in a separate process.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator

import psutil
import torch

from benchmarks.figures import Figure
from benchmarks.ranks import finished
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import STAGING_BUFFERS, HostBufferPool, pages
from deepspeed_alst.offload.swapper import Swapper

LAYERS, HIDDEN = 32, 1024
# Tensors of more than 32 MiB: glibc may keep the memory of smaller ones after they are freed.
LENGTHS = (17_000, 25_000, 34_000)


def one_pass(tier: str, length: int) -> tuple[int, int, int]:
    """Return resident bytes added by a forward, and bytes written to and read from disk."""
    with tempfile.TemporaryDirectory() as folder:
        if tier == "disk":
            store = ActivationStore(HostBufferPool(budget=0), Swapper(DiskFile(folder)))
        else:
            store = ActivationStore(HostBufferPool())
        before = _resident()
        gets = []
        for layer in range(LAYERS):
            gets.append(store.group().put(torch.full((1, length, HIDDEN), float(layer), dtype=torch.bfloat16)))
        store.release_copied()
        grown = _resident() - before
        for layer in reversed(range(LAYERS)):
            tensor = gets.pop()()
            assert tensor[0, 0, 0] == layer and tensor[0, -1, -1] == layer
        store.close()
    return grown, store.counts.bytes_to_disk, store.counts.bytes_back


def rows() -> Iterator[Figure]:
    """Yield all figures with their targets."""
    for tier, expected in (("host", LAYERS * HIDDEN * 2), ("disk", STAGING_BUFFERS * HIDDEN * 2)):
        grown = {length: _in_a_process(tier, length) for length in LENGTHS}
        first, last = LENGTHS[0], LENGTHS[-1]
        slope = (grown[last][0] - grown[first][0]) / (last - first)
        name = f"{tier} tier: resident bytes a token of {LAYERS} layers"
        yield Figure(name, (f"{slope:,.0f}",), f"<= {expected:,} + 5 %", slope <= 1.05 * expected)
    for length, (_, *moved) in grown.items():
        whole = LAYERS * pages(length * HIDDEN * 2)
        written, read = (f"{each / 2**20:,.0f}" for each in moved)
        target, met = f"{whole / 2**20:,.0f} MiB each", moved == [whole, whole]
        yield Figure(f"disk tier: {length:,} tokens", (f"{written} MiB written, {read} read",), target, met)


def _in_a_process(tier: str, length: int) -> tuple[int, int, int]:
    program = f"import sys; from benchmarks.offload import tiers; print(*tiers.one_pass({tier!r}, {length}))"
    done = finished([sys.executable, "-c", program], 900.0, stdout=subprocess.PIPE, check=True)
    grown, written, read = map(int, done.stdout.split()[-3:])
    return grown, written, read


def _resident() -> int:
    return psutil.Process().memory_info().rss

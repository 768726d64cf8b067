"""Placement of checkpointed layers' activations on the host and on disk, and the memory that a host has for them.

The plan is integers only, so that all ranks decide alike. Legend: s tokens of a rank's shard, S of the whole sequence.
"""

import bisect
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.offload.host_buffers import RING, pages

_KEY = "alst.activation_checkpoint_cpu_offload"
# Computation in the time that a byte takes to the host: 600 TFLOPS over PCIe's 25 GB/s. Slower devices hide more.
_FLOPS_PER_BYTE = 24_000
# Reserved for other processes, useful page cache, and later allocations of torch and the libraries.
_RESERVED_SHARE = 20
_LEAST_RESERVED = 2**30
_NO_LIMIT = 2**63 - 1
# Of cgroups version 2 and 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class Layers:
    """Offloaded tensors of a model's checkpointed layers, per rank and micro-step.

    Bytes are per token and layer: of the layer's input, attention's output and its log-sum-exp.
    """

    num_layers: int
    keep_last: int  # last layers whose tensors stay on the device
    input_bytes: int
    output_bytes: int
    lse_bytes: int
    matrix_elements: int  # of a layer's weight matrices that each token is multiplied with
    head_elements: int  # of a layer's query heads together
    lean_layers: int = 0  # those of them that run in chunks
    chunk_tokens: int = 1  # of a chunk, of all samples of a batch
    norms: int = 0  # that run in chunks and save their inputs too

    def sizes(self, tokens: int, with_outputs: bool) -> list[int]:
        """Return the bytes of each tensor of one layer, rounded up to pages; in chunks, of each size."""
        sizes = self._of_layer(tokens, with_outputs) if self.lean_layers < self.num_layers else []
        if self.lean_layers:
            sizes += [size for _, each in self._chunks(tokens) for size in self._of_layer(each, with_outputs)]
        return sizes

    def waiting(self, tokens: int, with_outputs: bool) -> int:
        """Return the offloaded bytes of all layers, rounded up to pages."""
        layers = max(0, self.num_layers - self.keep_last)
        in_chunks = min(self.lean_layers, layers)
        found = (layers - in_chunks) * sum(self._of_layer(tokens, with_outputs))
        for count, each in self._chunks(tokens) if self.lean_layers else ():
            found += count * in_chunks * sum(self._of_layer(each, with_outputs))
            found += count * self.norms * sum(self._of_layer(each, False))
        return found

    def _of_layer(self, tokens: int, with_outputs: bool) -> list[int]:
        sizes = [self.input_bytes, *([self.output_bytes, self.lse_bytes] if with_outputs else [])]
        return [pages(tokens * size) for size in sizes if size]

    def _chunks(self, tokens: int) -> list[tuple[int, int]]:
        """Return how many chunks there are of each number of tokens."""
        count, rest = divmod(tokens, self.chunk_tokens)
        return [each for each in ((count, self.chunk_tokens), (1, rest)) if each[0] and each[1]]

    def copy_is_hidden(self, sequence: int) -> bool:
        """Return True if a layer's forward over S tokens takes longer than copying its input and attention's output.

        Counts matrix products, and causal attention to half of the sequence, on a device with a fast GPU's rates.
        """
        flops = 2 * self.matrix_elements + 2 * sequence * self.head_elements
        return _FLOPS_PER_BYTE * (self.input_bytes + self.output_bytes + self.lse_bytes) <= flops


@dataclass(frozen=True)
class MemoryBudget:
    """Memory available to one rank."""

    host: int  # bytes of host memory, the same for each rank of the host
    disk: int | None = None  # bytes on disk; None without a disk tier
    budget: int | None = None  # host_budget of all ranks of a host; None if the host's memory is the limit


@dataclass(frozen=True)
class Plan:
    """Placement of a micro-step's activations."""

    keeps_attention: bool
    host_bytes: int
    disk_bytes: int
    ring_bytes: int  # of the host, for transfers to and from disk
    reason: str  # to save attention's output or not


def decide(
    layers: Layers,
    tokens: int,
    room: MemoryBudget,
    wanted: bool | Literal["auto"],
    shard: tuple[int, int] = (1, 1),
) -> Plan:
    """Decide the placement of a micro-step's activations, of B*s tokens of a shard.

    ``room`` is that of the rank with the least, ``wanted`` is ``save_attention_output``, ``shard`` the ranks per
    sequence and the sequences per batch.

    Raises:
        OffloadError: inputs, or requested outputs, do not fit; names the longest sequence that fits.
    """
    keeps, reason = keeps_output(layers, tokens, room.host, wanted, tokens // shard[1] * shard[0])
    places = _places(layers, tokens, room, keeps)
    if places is None:
        raise OffloadError(_too_much(layers, tokens, room, keeps, shard))
    return Plan(keeps, *places, reason)


def keeps_output(
    layers: Layers, tokens: int, host: int, wanted: bool | Literal["auto"], sequence: int
) -> tuple[bool, str]:
    """Return True if attention's output is kept, for B*s tokens of a shard and a whole sequence's, and the reason."""
    if wanted != "auto":
        return wanted, "save_attention_output"
    fits = layers.waiting(tokens, True) <= host
    if fits and layers.copy_is_hidden(sequence):
        return True, "auto: its copy hides behind the computation, and the host has room"
    return False, "auto: " + ("its copy would take longer than a layer's forward" if fits else "no room on the host")


def longest(layers: Layers, room: MemoryBudget, keeps: bool) -> int:
    """Return the most tokens per rank that fit."""
    return bisect.bisect_left(range(1, 2**48), True, key=lambda tokens: _places(layers, tokens, room, keeps) is None)


def _places(layers: Layers, tokens: int, room: MemoryBudget, keeps: bool) -> tuple[int, int, int] | None:
    """Return the bytes on the host, on disk and in the ring between them; None if they do not fit."""
    needed = layers.waiting(tokens, keeps)
    if needed <= room.host:
        return needed, 0, 0
    # Tensors are not split, so up to one of the largest may not fit in the remaining bytes.
    largest = max(layers.sizes(tokens, keeps))
    ring = min(RING * largest, room.host)
    on_host = min(needed, room.host - ring)
    to_disk = min(needed, needed - on_host + largest)
    return None if room.disk is None or to_disk > room.disk else (on_host, to_disk, ring)


def _too_much(layers: Layers, tokens: int, room: MemoryBudget, keeps: bool, shard: tuple[int, int]) -> str:
    sp_size, batch = shard
    whole, fitting = tokens // batch * sp_size, longest(layers, room, keeps) // batch * sp_size
    need, host, on_disk = map(format_bytes, (layers.waiting(tokens, keeps), room.host, room.disk or 0))
    budget = "" if room.budget is None else f" (host_budget={room.budget}, of all ranks of a host)"
    ways_out = [
        "a larger host_budget" if budget else "",
        f"the disk tier ({_KEY}.nvme_path)" if room.disk is None else "a larger disk",
        "save_attention_output: false" if keeps else "",
        f"sequences of at most {fitting:,} tokens" if fitting else "",
    ]
    *others, last = filter(None, ways_out)
    return (
        f"{_KEY}: layer inputs{' and attention outputs' if keeps else ''} of a sequence of {whole:,} tokens need "
        f"{need} of host memory for each rank, and there is room for {host}{budget}"
        f"{'' if room.disk is None else f' and {on_disk} on disk'}. "
        f"Use {', '.join(others) + ', or ' if others else ''}{last}."
    )


def spare_bytes() -> int:
    """Return the bytes available to this host's processes, minus a reserve of 1/20 and at least 1 GiB."""
    available = min(psutil.virtual_memory().available, cgroup_bytes())
    return max(0, available - max(_LEAST_RESERVED, available // _RESERVED_SHARE))


def cgroup_bytes(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left in this process's cgroups, outer ones included; 2**63 - 1 without limits."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    left = [_NO_LIMIT]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            base = root / "memory" if controllers else root
            inner = base / path.lstrip("/")
            # Inside a container the path may be the host's, and the limit is at the visible root.
            left += [_left_in(folder) for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
    return min(left)


def _left_in(folder: Path) -> int:
    for limit_name, usage_name, cache_name in _CGROUP_FILES:
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            # Inactive cache is reclaimed before the limit applies.
            return max(0, int(limit) - usage + int(stat.get(cache_name, 0)))
    return _NO_LIMIT

"""Placement of checkpointed layers' activations on the host and on disk, and the host memory available for them.

The plan is integers only, so that all ranks decide alike. Legend: s tokens of a rank's shard, S of the whole sequence.
"""

import bisect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import psutil

from deepspeed_alst.config.schema import Packing
from deepspeed_alst.errors import OffloadError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.kernels.bf16_codec import packed_bytes
from deepspeed_alst.offload.host_buffers import STAGING_BUFFERS, pages

_KEY = "alst.activation_checkpoint_cpu_offload"
# Computation in the time that a byte takes to the host: 600 TFLOPS over PCIe's 25 GB/s. Slower devices hide more.
_FLOPS_PER_BYTE = 24_000
# Reserved for other processes, useful page cache, and later allocations of torch and the libraries.
_RESERVED_SHARE = 20
_MIN_RESERVED_BYTES = 2**30
_NO_LIMIT = 2**63 - 1
# Of cgroups version 2 and 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of the offloaded tensors of a model's checkpointed layers, per rank and micro-step.

    Bytes are per token and layer: of the layer's input, attention's output and its log-sum-exp.
    """

    num_layers: int
    keep_last: int  # last layers whose tensors stay on the device
    input_bytes: int
    output_bytes: int
    lse_bytes: int
    matrix_elements: int  # of a layer's weight matrices that each token is multiplied with
    head_elements: int  # of a layer's query heads together
    num_lean_layers: int = 0  # those of them that run in chunks
    chunk_tokens: int = 1  # of a chunk, of all samples of a batch
    num_norms: int = 0  # that run in chunks and save their inputs too
    packing: Packing = False  # of inputs and outputs, which are bf16; sizes of "auto" are the packed ones

    def resolve_packing(self, tokens: int, num_saved: int, host_bytes: int) -> "LayerSizes":
        """Return the sizes with "auto" decided: packed if the tensors exceed the host's memory otherwise."""
        if self.packing != "auto":
            return self
        fits = self.unpacked().offloaded_bytes(tokens, num_saved) <= host_bytes
        return self.unpacked() if fits else replace(self, packing="lossless")

    def unpacked(self) -> "LayerSizes":
        """Return the sizes without packing."""
        return replace(self, packing=False)

    def tensor_bytes(self, tokens: int, num_saved: int) -> list[int]:
        """Return the bytes of each tensor of a layer, and of a layer in chunks, rounded up to pages."""
        each = [tokens] if self.num_lean_layers < self.num_layers else []
        each += [size for _, size in self._chunks(tokens)]
        sizes = [size for few in each for size in (self._input(few), *(self._outputs(few) if num_saved else ()))]
        return list(filter(None, sizes))

    def offloaded_bytes(self, tokens: int, num_saved: int) -> int:
        """Return the offloaded bytes of all layers, of which the first ``num_saved`` save attention's output."""
        layers = max(0, self.num_layers - self.keep_last)
        saved, lean = min(num_saved, layers), min(self.num_lean_layers, layers)
        saved_lean = min(saved, lean)  # as many as there can be: chunks take more, being rounded up to pages
        total = (layers - lean) * self._input(tokens) + (saved - saved_lean) * sum(self._outputs(tokens))
        for count, each in self._chunks(tokens):
            total += count * ((lean + self.num_norms) * self._input(each) + saved_lean * sum(self._outputs(each)))
        return total

    def _input(self, tokens: int) -> int:
        return self._packed(tokens * self.input_bytes)

    def _outputs(self, tokens: int) -> tuple[int, int]:
        return self._packed(tokens * self.output_bytes), pages(tokens * self.lse_bytes) if self.lse_bytes else 0

    def _packed(self, size: int) -> int:
        return pages(min(size, packed_bytes(size // 2)) if self.packing else size) if size else 0

    def _chunks(self, tokens: int) -> list[tuple[int, int]]:
        """Return pairs of a number of chunks and their tokens; none without layers in chunks."""
        if not self.num_lean_layers:
            return []
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

    host_bytes: int  # the same for each rank of a host
    disk_bytes: int | None = None  # None without a disk tier
    host_budget: int | None = None  # of all ranks of a host; None if the host's memory is the limit


@dataclass(frozen=True)
class Plan:
    """Placement of a micro-step's activations."""

    num_saved: int  # first layers that save attention's output
    host_bytes: int
    disk_bytes: int
    staging_bytes: int  # on the host, for transfers to and from disk
    reason: str  # to save attention's output or recompute it
    layers: LayerSizes  # with packing decided


def make_plan(
    layers: LayerSizes,
    tokens: int,
    memory: MemoryBudget,
    wanted: bool | Literal["auto"],
    shard: tuple[int, int] = (1, 1),
) -> Plan:
    """Plan the placement of a micro-step's activations, of B*s tokens of a shard.

    ``memory`` is that of the rank with the least, ``wanted`` is ``save_attention_output``, ``shard`` the ranks per
    sequence and the sequences per batch.

    Raises:
        OffloadError: inputs, or requested outputs, do not fit; names the longest sequence that fits.
    """
    num_saved, reason = count_saved(layers, tokens, memory.host_bytes, wanted, tokens // shard[1] * shard[0])
    layers = layers.resolve_packing(tokens, num_saved, memory.host_bytes)
    placement = _placement(layers, tokens, memory, num_saved)
    if placement is None:
        raise OffloadError(_out_of_memory(layers, tokens, memory, num_saved, shard))
    return Plan(num_saved, *placement, reason, layers)


def count_saved(
    layers: LayerSizes, tokens: int, host_bytes: int, wanted: bool | Literal["auto"], sequence: int
) -> tuple[int, str]:
    """Return how many layers save attention's output, and the reason.

    They are the first ones, so that those that stay on the device save theirs only if all layers do.

    Args:
        layers: sizes.
        tokens: B*s of a shard.
        host_bytes: of a rank.
        wanted: ``save_attention_output``.
        sequence: tokens of a whole sequence.
    """
    if wanted != "auto":
        return layers.num_layers * wanted, "save_attention_output"
    if not layers.copy_is_hidden(sequence):
        return 0, "auto: its copy would take longer than a layer's forward"
    # Outputs leave room for all inputs unpacked, as inputs that overflow are stored: they fit as they would without
    # outputs. With room for unpacked outputs too, packing would save no more of them.
    room = host_bytes - (layers.unpacked().offloaded_bytes(tokens, 0) - layers.offloaded_bytes(tokens, 0))
    fitting = (count for count in range(1, layers.num_layers + 1) if layers.offloaded_bytes(tokens, count) <= room)
    num_saved = max(fitting, default=0)
    if num_saved < layers.num_layers:
        return num_saved, f"auto: {'more' if num_saved else 'it'} exceeds the host's memory"
    return num_saved, "auto: its copy overlaps with computation, and fits on the host"


def describe_output(num_saved: int, num_layers: int) -> str:
    """Return in words where attention's output is saved."""
    if 0 < num_saved < num_layers:
        return f"saved in the first {num_saved} of {num_layers} layers"
    return "saved" if num_saved else "recomputed"


def max_tokens(layers: LayerSizes, memory: MemoryBudget, num_saved: int) -> int:
    """Return the most tokens per rank that fit."""
    tokens = range(1, 2**48)
    return bisect.bisect_left(tokens, True, key=lambda each: _placement(layers, each, memory, num_saved) is None)


def _placement(layers: LayerSizes, tokens: int, memory: MemoryBudget, num_saved: int) -> tuple[int, int, int] | None:
    """Return the bytes on the host, on disk and in staging buffers; None if they do not fit."""
    needed = layers.offloaded_bytes(tokens, num_saved)
    if needed <= memory.host_bytes:
        return needed, 0, 0
    # Tensors are not split, so up to one of the largest may not fit in the remaining bytes.
    largest = max(layers.tensor_bytes(tokens, num_saved))
    staging = min(STAGING_BUFFERS * largest, memory.host_bytes)
    on_host = min(needed, memory.host_bytes - staging)
    on_disk = min(needed, needed - on_host + largest)
    return None if memory.disk_bytes is None or on_disk > memory.disk_bytes else (on_host, on_disk, staging)


def _out_of_memory(
    layers: LayerSizes, tokens: int, memory: MemoryBudget, num_saved: int, shard: tuple[int, int]
) -> str:
    sp_size, batch = shard
    sequence, fitting = tokens // batch * sp_size, max_tokens(layers, memory, num_saved) // batch * sp_size
    needed = format_bytes(layers.offloaded_bytes(tokens, num_saved))
    available = format_bytes(memory.host_bytes)
    if memory.host_budget is not None:
        available += f" (host_budget={memory.host_budget} for all ranks of a host)"
    if memory.disk_bytes is not None:
        available += f" and {format_bytes(memory.disk_bytes)} on disk"
    remedies = [
        "a larger host_budget" if memory.host_budget is not None else "",
        f"the disk tier ({_KEY}.nvme_path)" if memory.disk_bytes is None else "a larger disk",
        "save_attention_output: false" if num_saved else "",
        f"sequences of at most {fitting:,} tokens" if fitting else "",
    ]
    *others, last = filter(None, remedies)
    return (
        f"{_KEY}: layer inputs{' and attention outputs' if num_saved else ''} of a sequence of {sequence:,} tokens "
        f"need {needed} of host memory per rank; available: {available}. "
        f"Use {', '.join(others) + ', or ' if others else ''}{last}."
    )


def available_bytes() -> int:
    """Return the bytes available to this host's processes, minus a reserve of 1/20 and at least 1 GiB."""
    available = min(psutil.virtual_memory().available, cgroup_available_bytes())
    return max(0, available - max(_MIN_RESERVED_BYTES, available // _RESERVED_SHARE))


def cgroup_available_bytes(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes available in this process's cgroups and their parents; 2**63 - 1 without limits."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return _NO_LIMIT
    available = [_NO_LIMIT]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            base = root / "memory" if controllers else root
            inner = base / path.lstrip("/")
            # Inside a container the path may be the host's, and the limit is at the visible root.
            available += [_available_in(folder) for folder in (inner, *inner.parents) if folder.is_relative_to(base)]
    return min(available)


def _available_in(folder: Path) -> int:
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

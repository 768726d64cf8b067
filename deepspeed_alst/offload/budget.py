"""Offload plan: bytes to offload, room for them, and whether attention's output fits too. Integers only.

Legend: s tokens of a rank's shard, S of the whole sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.offload.host_buffers import pages


@dataclass(frozen=True)
class Layers:
    """Offloaded tensors of a model's checkpointed layers, per rank and micro-step."""

    num_layers: int
    keep_last: int
    """Number of last layers whose tensors stay on the device."""
    input_bytes: int
    """Bytes of a layer's input per token."""
    output_bytes: int
    """Bytes of attention's output per token and layer."""
    lse_bytes: int
    """Bytes of attention's log-sum-exp per token and layer."""
    matrix_elements: int
    """Elements of a layer's weight matrices that each token is multiplied with."""
    head_elements: int
    """Elements of a layer's query heads together."""

    def sizes(self, tokens: int, with_outputs: bool) -> list[int]:
        """Return the bytes of each tensor of one layer, rounded up to pages."""
        sizes = [self.input_bytes, *([self.output_bytes, self.lse_bytes] if with_outputs else [])]
        return [pages(tokens * size) for size in sizes if size]

    def waiting(self, tokens: int, with_outputs: bool) -> int:
        """Return the offloaded bytes of all layers, rounded up to pages."""
        return max(0, self.num_layers - self.keep_last) * sum(self.sizes(tokens, with_outputs))

    def longest(self, room: int, with_outputs: bool = False) -> int:
        """Return the most tokens per rank that fit in ``room`` bytes."""
        if self.num_layers <= self.keep_last:
            return 0
        return _most(lambda tokens: self.waiting(tokens, with_outputs) <= room)


@dataclass(frozen=True)
class Bandwidth:
    """Measured rates of a device."""

    copied_bytes: float
    """Bytes per second between device and host."""
    flops: float
    """FLOPs per second in the model's dtype."""


@dataclass(frozen=True)
class MemoryBudget:
    """Memory available to one rank."""

    host: int
    """Bytes of host memory, the same for each rank of the host."""
    disk: int | None = None
    """Bytes on disk; None without a disk tier."""
    budget: int | None = None
    """The user's ``host_budget`` for all ranks of a host; None if the host's memory is the limit."""


@dataclass(frozen=True)
class Plan:
    """Placement of a micro-step's activations."""

    keeps_attention: bool
    host_bytes: int
    disk_bytes: int
    ring_bytes: int
    """Host bytes of the ring of buffers for transfers to and from disk."""
    reason: str
    """Reason to save attention's output or not."""


def copy_is_hidden(layers: Layers, rates: Bandwidth, sequence: int) -> bool:
    """Return True if copying a layer's input and attention's output is hidden by its forward.

    Counts matrix products and causal attention: a token is multiplied with its layer's matrices, and its heads with
    the keys and values of half of the whole sequence.
    """
    flops = 2 * layers.matrix_elements + 2 * sequence * layers.head_elements
    copied = layers.input_bytes + layers.output_bytes + layers.lse_bytes
    return copied / rates.copied_bytes <= flops / rates.flops


def decide(
    layers: Layers,
    tokens: int,
    room: MemoryBudget,
    wanted: bool | Literal["auto"],
    is_hidden: bool,
    shard: tuple[int, int] = (1, 1),
    ring_tensors: int = 4,
) -> Plan:
    """Decide the placement of a micro-step's activations.

    Args:
        layers: sizes of the model's layers.
        tokens: tokens of this rank's shard, B*s.
        room: room of the rank with the least.
        wanted: ``save_attention_output``.
        is_hidden: see ``hides``.
        shard: ranks per sequence and sequences per batch, to report the longest sequence that fits.
        ring_tensors: number of tensors in flight to disk at once, in host memory.

    Raises:
        OffloadError: inputs, or requested outputs, do not fit; names the longest sequence that fits.
    """
    with_outputs = layers.waiting(tokens, True)
    fits = with_outputs <= room.host
    keeps, reason = wanted is True, "save_attention_output"
    if wanted == "auto":
        keeps = fits and is_hidden
        reason = "auto: its copy hides behind the computation, and the host has room"
        if not keeps:
            reason = "auto: " + ("its copy would take longer than a layer's forward" if fits else "no room on the host")
    places = _places(layers, tokens, room, keeps, ring_tensors)
    if places is None:
        longest = _most(lambda fewer: _places(layers, fewer, room, keeps, ring_tensors) is not None)
        raise OffloadError(_too_much(layers, tokens, longest, room, keeps, shard))
    return Plan(keeps, *places, reason)


def _places(
    layers: Layers, tokens: int, room: MemoryBudget, keeps: bool, ring_tensors: int
) -> tuple[int, int, int] | None:
    """Return the bytes on the host, on disk and in the ring between them; None if they do not fit."""
    needed = layers.waiting(tokens, keeps)
    if needed <= room.host:
        return needed, 0, 0
    # Tensors are not split, so up to one of the largest may not fit in the remaining bytes.
    largest = max(layers.sizes(tokens, keeps))
    ring = min(ring_tensors * largest, room.host)
    on_host = min(needed, room.host - ring)
    to_disk = min(needed, needed - on_host + largest)
    return None if room.disk is None or to_disk > room.disk else (on_host, to_disk, ring)


def _most(fits: Callable[[int], bool]) -> int:
    """Return the largest number that fits; ``fits`` must be monotonic."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _too_much(
    layers: Layers, tokens: int, longest: int, room: MemoryBudget, keeps: bool, shard: tuple[int, int]
) -> str:
    sp_size, batch = shard
    needed = layers.waiting(tokens, keeps)
    whole, fitting = tokens // batch * sp_size, longest // batch * sp_size
    budget = "" if room.budget is None else f" (host_budget={room.budget}, of all ranks of a host)"
    need, host, on_disk = (format_bytes(each) for each in (needed, room.host, room.disk or 0))
    what = "layer inputs and attention outputs" if keeps else "layer inputs"
    disk = "the disk tier (alst.activation_checkpoint_cpu_offload.nvme_path)" if room.disk is None else "a larger disk"
    ways_out = [*(["a larger host_budget"] if budget else []), disk]
    ways_out += ["save_attention_output: false"] if keeps else []
    ways_out += [f"sequences of at most {fitting:,} tokens"] if fitting else []
    use = ", ".join(ways_out[:-1]) + ", or " + ways_out[-1] if len(ways_out) > 1 else ways_out[0]
    return (
        f"alst.activation_checkpoint_cpu_offload: {what} of a sequence of {whole:,} tokens need {need} of host memory "
        f"for each rank, and there is room for {host}{budget}{'' if room.disk is None else f' and {on_disk} on disk'}. "
        f"Use {use}."
    )

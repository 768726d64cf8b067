"""What waits for the backward, what room there is for it, and whether attention's output may wait too: integers only.

Legend: s tokens of a rank's shard, S of the whole sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepspeed_alst.errors import OffloadError
from deepspeed_alst.offload.pool import pages
from deepspeed_alst.words import in_words


@dataclass(frozen=True)
class Layers:
    """What a model's checkpointed layers leave waiting, of one rank in one micro-step."""

    num_layers: int
    keep_last: int
    """Layers at the end whose tensors stay on the device."""
    input_bytes: int
    """Of one token in one layer."""
    output_bytes: int
    """Of attention's output, of one token in one layer."""
    lse_bytes: int
    """Of attention's log-sum-exp."""
    matrix_elements: int
    """Of the weights that each token is multiplied with in a layer."""
    head_elements: int
    """Of a layer's query heads together."""

    def sizes(self, tokens: int, with_outputs: bool) -> list[int]:
        """Bytes of one layer's tensors, to the page."""
        sizes = [self.input_bytes, *([self.output_bytes, self.lse_bytes] if with_outputs else [])]
        return [pages(tokens * size) for size in sizes if size]

    def waiting(self, tokens: int, with_outputs: bool) -> int:
        """Bytes of all layers, to the page."""
        return max(0, self.num_layers - self.keep_last) * sum(self.sizes(tokens, with_outputs))

    def longest(self, room: int, with_outputs: bool = False) -> int:
        """The most tokens of a rank that so many bytes have room for."""
        if self.num_layers <= self.keep_last:
            return 0
        return _most(lambda tokens: self.waiting(tokens, with_outputs) <= room)


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do."""

    copied_bytes: float
    """Per second, between it and the host."""
    flops: float
    """Per second, in the model's dtype."""


@dataclass(frozen=True)
class Room:
    """What one rank may fill."""

    host: int
    """Bytes of host memory, all ranks of the host having as much."""
    disk: int | None = None
    """Bytes on disk; None without a disk tier."""
    budget: int | None = None
    """The user's bytes for all ranks of a host (``host_budget``); None where it is the host that has no more."""


@dataclass(frozen=True)
class Plan:
    """What is done with the activations of a micro-step."""

    keeps_attention: bool
    host_bytes: int
    disk_bytes: int
    ring_bytes: int
    """Of the host's, for what is under way to disk or back."""
    reason: str
    """Why attention's output is kept or not."""


def hides(layers: Layers, rates: Rates, sequence: int) -> bool:
    """Whether copying a layer's input and attention's output takes no longer than the layer's forward.

    By the arithmetic of matrix products and causal attention alone: a token of one layer is multiplied with its
    matrices, and its heads with half of the whole sequence's keys and values.
    """
    flops = 2 * layers.matrix_elements + 2 * sequence * layers.head_elements
    copied = layers.input_bytes + layers.output_bytes + layers.lse_bytes
    return copied / rates.copied_bytes <= flops / rates.flops


def decide(
    layers: Layers,
    tokens: int,
    room: Room,
    wanted: bool | Literal["auto"],
    is_hidden: bool,
    shard: tuple[int, int] = (1, 1),
    ring_tensors: int = 4,
) -> Plan:
    """What is kept where.

    Args:
        layers: of the model.
        tokens: of this rank's shard, B*s.
        room: of the rank with the least.
        wanted: ``save_attention_output``.
        is_hidden: see ``hides``.
        shard: ranks of a sequence, and sequences of a batch: for the longest sequence that would fit.
        ring_tensors: how many tensors are under way to disk at once, in host memory.

    Raises:
        OffloadError: there is no room for the inputs, or for the outputs too where they are wanted; with the longest
            sequence that would fit.
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


def _places(layers: Layers, tokens: int, room: Room, keeps: bool, ring_tensors: int) -> tuple[int, int, int] | None:
    """Bytes on the host, on disk and in the ring between them; None if there is no room."""
    needed = layers.waiting(tokens, keeps)
    if needed <= room.host:
        return needed, 0, 0
    # Tensors go as a whole: of the largest, one may not fit that bytes would leave room for.
    largest = max(layers.sizes(tokens, keeps))
    ring = min(ring_tensors * largest, room.host)
    on_host = min(needed, room.host - ring)
    to_disk = min(needed, needed - on_host + largest)
    return None if room.disk is None or to_disk > room.disk else (on_host, to_disk, ring)


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where none fits that is above one that does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _too_much(layers: Layers, tokens: int, longest: int, room: Room, keeps: bool, shard: tuple[int, int]) -> str:
    sp_size, batch = shard
    needed = layers.waiting(tokens, keeps)
    whole, fitting = tokens // batch * sp_size, longest // batch * sp_size
    budget = "" if room.budget is None else f" (host_budget={room.budget}, of all ranks of a host)"
    need, host, on_disk = (in_words(each) for each in (needed, room.host, room.disk or 0))
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

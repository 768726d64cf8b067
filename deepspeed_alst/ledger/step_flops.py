"""FLOPs of a training step by formula, in two conventions; no tensors and no model needed.

A multiply-add is 2. Per token, each matrix weight costs 2 in the forward, 2 for the input gradient, and 2 for the
weight gradient if it trains: 6 in all. Attention costs per pair of a token and one it attends to: a score and its part
of the output, 2 * (D_qk + D_v) per head, and twice that in the backward.

- **model FLOPs** (as in MFU, PaLM, arXiv 2204.02311): pairs that the mask allows, half of the square, and
  no recomputation.
- **ALST's** (arXiv 2506.13996): the full square of scores, and the forward of checkpointed layers twice.

Neither counts operators other than matmuls: norms, activations, softmax, the scans of layers without attention, the
optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Attention range in a document: all tokens up to itself, a window, or the chunk so far."""

    window: int | None = None
    chunk: int | None = None

    def pairs(self, length: int) -> int:
        """Count attention pairs, self-pairs included, in a document of this length."""
        if self.chunk is not None:
            whole, rest = divmod(length, self.chunk)
            return whole * _triangle(self.chunk) + _triangle(rest)
        begin = length if self.window is None else min(length, self.window)
        return _triangle(begin) + (length - begin) * begin

    def both_ways(self, length: int) -> int:
        """Count pairs in both directions, without the causal half: ``length ** 2`` for full attention."""
        return 2 * self.pairs(length) - length


@dataclass(frozen=True)
class StepSizes:
    """Model sizes for the formulas."""

    trained: int
    """Trained matrix weights that one token passes (active experts only)."""
    frozen: int
    """Frozen matrix weights, likewise."""
    recomputed: int
    """Trained and frozen weights in checkpointed layers."""
    attention: tuple[tuple[Span, int], ...]
    """Attention range and number of layers with it."""
    pair_width: int
    """``heads * (D_qk + D_v)`` of an attention layer."""
    recomputed_attention: float
    """Share of attention layers that are checkpointed."""


def model_flops(sizes: StepSizes, tokens: float, pairs: Sequence[float]) -> float:
    """Compute forward and backward: ``(4 * (trained + frozen) + 2 * trained) * tokens + 6 * pair_width * pairs``.

    Args:
        sizes: of the model; 6 per weight and token if all weights train.
        tokens: number of counted tokens.
        pairs: counted pairs in one layer (``Span.pairs``), for each entry of ``sizes.attention``.
    """
    return _weight_flops(sizes) * tokens + 3 * _pair_flops(sizes, pairs)


def alst_flops(sizes: StepSizes, tokens: float, pairs: Sequence[float]) -> float:
    """Compute ALST's FLOPs: ``pairs`` both ways (``Span.both_ways``), checkpointed forwards twice."""
    again = 2 * sizes.recomputed * tokens
    return _weight_flops(sizes) * tokens + again + (3 + sizes.recomputed_attention) * _pair_flops(sizes, pairs)


def _weight_flops(sizes: StepSizes) -> int:
    return 4 * (sizes.trained + sizes.frozen) + 2 * sizes.trained


def _pair_flops(sizes: StepSizes, pairs: Sequence[float]) -> float:
    """Compute the forward FLOPs of all attention layers' pairs."""
    seen = sum(layers * count for (_, layers), count in zip(sizes.attention, pairs, strict=True))
    return 2 * sizes.pair_width * seen


def _triangle(length: int) -> int:
    return length * (length + 1) // 2

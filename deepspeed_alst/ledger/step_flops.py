"""FLOPs of a training step by formula, in two conventions. Integers only: no tensor, no model.

A multiplication and an addition are 2. A token pays 2 for each weight of a matrix in the forward, 2 for the gradient of
the matrix's input, and 2 for the weight's own where it trains: 6 in all. Attention pays for each pair of a token and
one that it sees: a score and its part of the output, 2 * (D_qk + D_v) a head, and twice that in the backward.

- **model FLOPs** (as in MFU, PaLM, arXiv 2204.02311): pairs that the mask lets see, which is half of the square, and
  nothing that is computed twice.
- **ALST's** (arXiv 2506.13996): the whole square of scores, and the forward of checkpointed layers once more.

What is no product of matrices counts for nothing in either: norms, activations, softmax, the scans of layers without
attention, the optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """What a token sees of its document: all up to itself, the last of that (a window), or the begun chunk of it."""

    window: int | None = None
    chunk: int | None = None

    def pairs(self, length: int) -> int:
        """Pairs of a token and one that it sees, itself among them, in a document of so many tokens."""
        if self.chunk is not None:
            whole, rest = divmod(length, self.chunk)
            return whole * _triangle(self.chunk) + _triangle(rest)
        begin = length if self.window is None else min(length, self.window)
        return _triangle(begin) + (length - begin) * begin

    def both_ways(self, length: int) -> int:
        """Pairs counted from either side, without the causal half: ``length ** 2`` where all is seen."""
        return 2 * self.pairs(length) - length


@dataclass(frozen=True)
class StepSizes:
    """What the formulas need of a model."""

    trained: int
    """Weights of matrices that one token passes (active experts alone) and that train."""
    frozen: int
    """The same of those that do not."""
    recomputed: int
    """Of both, those in checkpointed layers."""
    attention: tuple[tuple[Span, int], ...]
    """What attention layers see, and how many see that."""
    pair_width: int
    """``heads * (D_qk + D_v)`` of an attention layer."""
    recomputed_attention: float
    """The share of attention layers that are checkpointed."""


def model_flops(sizes: StepSizes, tokens: float, pairs: Sequence[float]) -> float:
    """Forward and backward, ``(4 * (trained + frozen) + 2 * trained) * tokens + 6 * pair_width * pairs``.

    Args:
        sizes: of the model; where all weights train that is 6 a weight and token.
        tokens: that count.
        pairs: that count in one layer (``Span.pairs``), one number for each entry of ``sizes.attention``.
    """
    return _weight_flops(sizes) * tokens + 3 * _pair_flops(sizes, pairs)


def alst_flops(sizes: StepSizes, tokens: float, pairs: Sequence[float]) -> float:
    """The same with ``pairs`` both ways (``Span.both_ways``), and the forward of checkpointed layers twice."""
    again = 2 * sizes.recomputed * tokens
    return _weight_flops(sizes) * tokens + again + (3 + sizes.recomputed_attention) * _pair_flops(sizes, pairs)


def _weight_flops(sizes: StepSizes) -> int:
    return 4 * (sizes.trained + sizes.frozen) + 2 * sizes.trained


def _pair_flops(sizes: StepSizes, pairs: Sequence[float]) -> float:
    """Of all attention layers' forward."""
    seen = sum(layers * count for (_, layers), count in zip(sizes.attention, pairs, strict=True))
    return 2 * sizes.pair_width * seen


def _triangle(length: int) -> int:
    return length * (length + 1) // 2

"""Masks of a whole sequence: plain causal, less the tokens that a window, chunks and packed documents hide.

Integers only, at any sequence length. Legend: S whole sequence, N documents.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from deepspeed_alst.errors import UnsupportedModelError

Rule = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(batch, head, query, key) -> bool`` on index tensors: the form of transformers' and flex attention's masks."""


class MaskReadError(UnsupportedModelError, AttributeError):
    """Error of a model that reads its mask, of which a rank has no tensor."""


@dataclass(frozen=True)
class Run:
    """Adjacent stretches of equal length that do not attend to one another."""

    start: int
    count: int
    length: int


@dataclass(frozen=True)
class MaskSpec:
    """Tokens hidden from a causal mask. It replaces the mask among a layer's arguments.

    So it is available when a checkpointed layer is recomputed, even after forwards of other batches.
    """

    window: int | None = None
    """Number of tokens a token attends to: itself and the ``window - 1`` before it."""
    chunk: int | None = None
    """Length of a chunk; tokens attend within theirs, and chunks count from the start of a document."""
    documents: tuple[int, ...] = ()
    """Bounds of packed documents, ``[N + 1]`` from 0 to S; empty if the sequence is one document."""

    def hides_nothing(self, length: int) -> bool:
        """Return True if it is plain causal attention over a sequence of this length."""
        short = [size for size in (self.window, self.chunk) if size is not None and size < length]
        return not short and len(self.documents) <= 2

    def runs(self, length: int) -> list[Run]:
        """Return the stretches of a sequence, in order; within one, only the window hides tokens."""
        runs: list[Run] = []
        for start, end in itertools.pairwise(self.documents or (0, length)):
            size = self.chunk or end - start
            count, rest = divmod(end - start, size) if size else (0, 0)
            for first, number, piece in ((start, count, size), (end - rest, 1, rest)):
                if not number * piece:
                    continue
                if runs and runs[-1].length == piece:
                    runs[-1] = Run(runs[-1].start, runs[-1].count + number, piece)
                else:
                    runs.append(Run(first, number, piece))
        return runs

    def rule(self, length: int, device: torch.device | str = "cpu") -> Rule:
        """Return the mask as a function of indices, for flex attention's block masks."""
        window, chunk = self.window, self.chunk
        bounds = torch.tensor(self.documents or (0, length), device=device)
        starts_S = torch.repeat_interleave(bounds[:-1], bounds.diff())

        def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            start = starts_S[query]
            seen = (key <= query) & (start == starts_S[key])
            if window is not None:
                seen = seen & (key > query - window)
            if chunk is not None:
                seen = seen & ((key - start) // chunk == (query - start) // chunk)
            return seen

        return sees

    def seen(self, length: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the mask as a tensor, ``[S, S]``: True where a token (row) attends to another."""
        places = torch.arange(length, device=device)
        return self.rule(length, device)(0, 0, places[:, None], places[None])

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # copy, pickle and dispatch protocols look these up
            raise AttributeError(name)
        _refuse(name)

    def __getitem__(self, index: Any) -> NoReturn:
        _refuse("a part")


def _refuse(what: str) -> NoReturn:
    raise MaskReadError(
        f"the model reads {what} of its attention mask, of which a rank has no tensor: what it makes of it would be a "
        "shard's. It is not available under sequence parallelism with this window, these chunks or packed documents"
    )

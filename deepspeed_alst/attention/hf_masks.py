"""Masks of a whole sequence under a window, chunks or packed documents, read from transformers' mask functions.

transformers composes a mask function of a few parts, for a shard's length here. Parts and their sizes are read from
closures, not evaluated: without a device read, at any length. Legend: S whole sequence, N documents.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    chunked_overlay,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.errors import UnsupportedModelError

if TYPE_CHECKING:
    from deepspeed_alst.attention.hf_attention import AttentionBackend
    from deepspeed_alst.core.forward_context import ForwardContext

_NONE = torch.zeros(1, 1, dtype=torch.long)
# Parts are identified by their code object, which all functions of one factory share.
AND = and_masks(causal_mask_function).__code__
_REMAP = remap_positions_for_packed_sequence(causal_mask_function, _NONE).__code__
PACKED = packed_sequence_mask_function(_NONE).__code__
_WINDOW = sliding_window_overlay(1).__code__
_CHUNK = chunked_overlay(1, _NONE).__code__

Rule = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""``(batch, head, query, key) -> bool`` on index tensors: the form of transformers' and flex attention's masks."""


class MaskReadError(UnsupportedModelError, AttributeError):
    """Error of a model that reads its mask, of which a rank has no tensor."""


def _no_tensor() -> NoReturn:
    raise MaskReadError(
        "the model reads its attention mask, which is not a tensor under sequence parallelism with a window, chunks or "
        "packed documents: use another model, or one document per row if it has neither of them"
    )


@dataclass(frozen=True)
class MaskSpec:
    """Tokens hidden from a causal mask, in place of the mask in the arguments of a layer.

    Layer arguments are available in the recomputation of a checkpointed layer, even after other batches' forwards.
    """

    window: int | None = None
    """Number of tokens a token attends to: itself and the ``window - 1`` before it."""
    chunk: int | None = None
    """Length of a chunk; tokens attend within theirs, and chunks count from the start of a document."""
    documents: tuple[int, ...] = ()
    """Bounds of packed documents, ``[N + 1]`` from 0 to S; empty if the sequence is one document."""
    rows: tuple["MaskSpec", ...] = ()
    """Mask of each sample of a batch, in place of the above, if their documents differ: at SP 1 only."""
    dense: Callable[[], Any] = field(default=_no_tensor, compare=False, repr=False)
    """Makes transformers' own mask, at SP 1 for what needs a tensor (hf_one_rank.py)."""

    def hides_nothing(self, length: int) -> bool:
        """Return True if it is plain causal attention over a sequence of this length."""
        short = [size for size in (self.window, self.chunk) if size is not None and size < length]
        return not short and len(self.documents) <= 2 and not self.rows

    def runs(self, length: int) -> list[tuple[int, int]]:
        """Return the independent stretches of a sequence, as ``(count, length)`` of adjacent equal ones."""
        runs: list[tuple[int, int]] = []
        for start, end in itertools.pairwise(self.documents or (0, length)):
            size = self.chunk or end - start
            whole, rest = divmod(end - start, size) if size else (0, 0)
            for piece in [size] * whole + [rest] * bool(rest):
                if runs and runs[-1][1] == piece:
                    runs[-1] = (runs[-1][0] + 1, piece)
                else:
                    runs.append((1, piece))
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy, pickle and dispatch protocols look these up
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[index]


def whole_mask(mask_function: Callable[..., Any], length: int, documents: tuple[int, ...]) -> MaskSpec | None:
    """Return the mask of a whole sequence of this length; None for plain causal attention.

    Raises:
        UnsupportedModelError: as ``read_mask``, or this version of transformers has other masks.
    """
    check_parts()
    mask = read_mask(mask_function, documents)
    return None if mask.hides_nothing(length) else mask


def read_mask(mask_function: Callable[..., Any], documents: tuple[int, ...] = ()) -> MaskSpec:
    """Return the mask of the whole sequence that a mask function of transformers describes.

    Args:
        mask_function: mask function of a shard. Its packed documents are ignored: they are only those of the shard.
        documents: bounds of the whole sequence's packed documents.

    Raises:
        UnsupportedModelError: the mask is not causal, or has an unknown part.
    """
    windows, chunks, causal = set(), set(), False
    for part in _parts(mask_function):
        code = getattr(part, "__code__", None)
        if part is causal_mask_function:
            causal = True
        elif code is _WINDOW:
            windows.add(enclosed(part)["sliding_window"])
        elif code is _CHUNK:
            # Its offset is the left padding, which is always 0.
            chunks.add(enclosed(part)["chunk_size"])
        else:
            name = getattr(part, "__qualname__", type(part).__name__)
            raise UnsupportedModelError(
                f"the model's mask has a part that is neither causal, nor a window, nor chunks ({name}): it cannot be "
                "made for the whole sequence under sequence parallelism"
            )
    if not causal or len(chunks) > 1:
        raise UnsupportedModelError(
            f"the model asks for a mask that is not causal, or has chunks of several lengths {sorted(chunks)}"
        )
    return MaskSpec(min(windows, default=None), min(chunks, default=None), documents)


def batch_mask(mask_function: Callable[..., Any]) -> MaskSpec:
    """Return the mask of a batch of whole sequences, packed documents of each sample included.

    Raises:
        UnsupportedModelError: as ``whole_mask``, or chunks of a document do not count from its start.
    """
    check_parts()
    mask, code = read_mask(mask_function), getattr(mask_function, "__code__", None)
    parts = enclosed(mask_function)["mask_functions"] if code is AND else ()
    found = {getattr(part, "__code__", None): part for part in parts}
    if PACKED not in found:
        return mask
    document_BS = enclosed(found[PACKED])["packed_sequence_mask"]
    starts_BS = torch.ones_like(document_BS, dtype=torch.bool)
    starts_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    if mask.chunk is not None and (enclosed(found[_REMAP])["position_ids"][starts_BS] % mask.chunk).any():
        raise UnsupportedModelError("chunks of packed documents whose position_ids do not start at 0")
    bounds = [(*starts_S.nonzero().flatten().tolist(), len(starts_S)) for starts_S in starts_BS]
    rows = tuple(replace(mask, documents=documents) for documents in bounds)
    return rows[0] if len(set(rows)) == 1 else MaskSpec(rows=rows)


def check_for_flash(name: str, mask_function: Callable[..., Any], length: int) -> None:
    """Raise if the mask has chunks, which flash attention lacks and transformers checks in a shard only."""
    for part in _parts(mask_function):
        if getattr(part, "__code__", None) is _CHUNK and (size := enclosed(part)["chunk_size"]) < length:
            raise UnsupportedModelError(
                f"attn_implementation='{name}' has no chunked attention, and the sequence of {length} tokens is longer "
                f"than the model's chunks of {size}; load the model with attn_implementation='sdpa'"
            )


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the parts that must all allow a pair of tokens, without those for packed documents."""
    code = getattr(mask_function, "__code__", None)
    if code is AND:
        for part in enclosed(mask_function)["mask_functions"]:
            yield from _parts(part)
    elif code is _REMAP:
        yield from _parts(enclosed(mask_function)["mask_function"])
    elif code is not PACKED:
        yield mask_function


def enclosed(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's closure variables by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


@functools.cache
def check_parts() -> None:
    """Compare the masks read with transformers' own functions, on two documents of 7 and 5 tokens."""
    run_isolated(_compare_parts)  # on real tensors, even under a fake tensor mode of the caller


def _compare_parts() -> None:
    positions, none = torch.cat([torch.arange(7), torch.arange(5)])[None], torch.zeros(1, dtype=torch.long)
    documents = packed_sequence_mask_function(torch.tensor([[0] * 7 + [1] * 5]))
    query, key = torch.arange(12)[:, None], torch.arange(12)[None, :]
    for plain in (causal_mask_function, sliding_window_causal_mask_function(3), chunked_causal_mask_function(3, none)):
        packed = and_masks(remap_positions_for_packed_sequence(plain, positions), documents)
        for asked, bounds in ((plain, ()), (packed, (0, 7, 12))):
            if not torch.equal(asked(0, 0, query, key), read_mask(asked, bounds).seen(12)):
                raise UnsupportedModelError(
                    "transformers.masking_utils of the installed transformers builds another mask by "
                    f"{plain.__qualname__} than the versions that were tested; install transformers 5.23 or 5.24"
                )


def mask_function_for(backend: "AttentionBackend", sp_size: int, calls: "ForwardContext") -> Callable[..., Any]:
    """Return one model's mask function for transformers; it returns None for plain causal attention."""

    @torch.compiler.disable
    def mask_function(
        *,
        mask_function: Callable[..., Any],
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: int = 0,
        attention_mask: Any = None,
        **kwargs: Any,
    ) -> MaskSpec | None:
        if hasattr(attention_mask, "images"):
            return attention_mask
        if calls.mask_of_batch is not None and not calls.inside:
            return calls.mask_of_batch(mask_function, kwargs["batch_size"], q_length, attention_mask, backend)
        # Models that count positions by a mask create one of ones if they get none.
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            raise UnsupportedModelError(
                "attention_mask reached the model: the sharded loader checks and drops it; remove it from the batch"
            )
        if kv_length != q_length or q_offset or kv_offset:
            raise UnsupportedModelError(
                f"the model asks for a mask of {q_length} queries for {kv_length} keys: generation with a cache, and "
                "attention to other sequences, are not available under sequence parallelism"
            )
        if mask_function is causal_mask_function and not calls.documents:
            return None
        length = q_length * sp_size
        if backend.uses_mask:
            return whole_mask(mask_function, length, calls.documents)
        # Flash attention takes windows and documents as arguments of its own.
        check_for_flash(backend.name, mask_function, length)
        return None

    return mask_function

"""Read a model's mask function of transformers and build the mask of the whole sequence.

transformers composes a mask function of a few parts, for a shard's length here. Parts and their window or chunk size
are read from closures, not evaluated: without a device read, at no cost for 4M tokens, on tensors without data. At
startup all parts are compared with transformers on every token pair of a small sequence. An unknown part is an error.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import masking_utils
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
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.hf_backends import AttentionBackend
from deepspeed_alst.sequence_parallel.mask_spec import MaskSpec

_NONE = torch.zeros(1, 1, dtype=torch.long)
# Parts are identified by their code object, which all functions of one factory share.
_AND = and_masks(causal_mask_function).__code__
_REMAP = remap_positions_for_packed_sequence(causal_mask_function, _NONE).__code__
_PACKED = packed_sequence_mask_function(_NONE).__code__
_WINDOW = sliding_window_overlay(1).__code__
_CHUNK = chunked_overlay(1, _NONE).__code__

MaskFunction = Callable[..., MaskSpec | None]


def mask_function_for(backend: AttentionBackend, sp_size: int, calls: ForwardContext) -> MaskFunction:
    """Return one model's mask function for transformers, which builds the attention mask of its layers.

    It returns None for plain causal attention, and always for flash attention, which takes windows and documents as
    arguments of its own.

    Raises:
        UnsupportedModelError: the parts of transformers' masks do not mean what this module assumes.
    """
    run_isolated(_try_parts)  # on real tensors, even under a fake tensor mode of the caller

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
        length = q_length * sp_size
        if not backend.uses_mask:
            _check_for_flash(backend, mask_function, length)
            return None
        mask = read_mask(mask_function, calls.documents)
        return None if mask.hides_nothing(length) else mask

    return mask_function


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
            windows.add(_enclosed(part)["sliding_window"])
        elif code is _CHUNK:
            # Its offset is the left padding, which is always 0.
            chunks.add(_enclosed(part)["chunk_size"])
        else:
            raise UnsupportedModelError(
                f"the model's mask has a part that is neither causal, nor a window, nor chunks ({_name(part)}): it "
                "cannot be made for the whole sequence under sequence parallelism"
            )
    if not causal or len(chunks) > 1:
        raise UnsupportedModelError(
            f"the model asks for a mask that is not causal, or has chunks of several lengths {sorted(chunks)}"
        )
    return MaskSpec(min(windows, default=None), min(chunks, default=None), documents)


def _parts(mask_function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yield the parts that must all allow a pair of tokens, without those for packed documents."""
    code = getattr(mask_function, "__code__", None)
    if code is _AND:
        for part in _enclosed(mask_function)["mask_functions"]:
            yield from _parts(part)
    elif code is _REMAP:
        yield from _parts(_enclosed(mask_function)["mask_function"])
    elif code is not _PACKED:
        yield mask_function


def _enclosed(function: Callable[..., Any]) -> dict[str, Any]:
    """Return a function's closure variables by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells}


def _name(part: Callable[..., Any]) -> str:
    return getattr(part, "__qualname__", type(part).__name__)


def _check_for_flash(backend: AttentionBackend, mask_function: Callable[..., Any], length: int) -> None:
    """Raise if the mask has chunks, which flash attention lacks and transformers checks in a shard only."""
    for part in _parts(mask_function):
        if getattr(part, "__code__", None) is _CHUNK and (size := _enclosed(part)["chunk_size"]) < length:
            raise UnsupportedModelError(
                f"attn_implementation='{backend.name}' has no chunked attention, and the sequence of {length} tokens "
                f"is longer than the model's chunks of {size}; load the model with attn_implementation='sdpa'"
            )


def _try_parts() -> None:
    """Compare the parsed masks with transformers' own functions, on two documents of 7 and 5 tokens."""
    documents = (0, 7, 12)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    of_document = torch.tensor([0] * 7 + [1] * 5)[None]
    query, key = torch.arange(12)[:, None], torch.arange(12)[None, :]
    none = torch.zeros(1, dtype=torch.long)
    for plain in (causal_mask_function, sliding_window_causal_mask_function(3), chunked_causal_mask_function(3, none)):
        packed = and_masks(
            remap_positions_for_packed_sequence(plain, positions), packed_sequence_mask_function(of_document)
        )
        for asked, bounds in ((plain, ()), (packed, documents)):
            mask = read_mask(asked, bounds)
            if not torch.equal(asked(0, 0, query, key), mask.seen(12)):
                raise UnsupportedModelError(
                    f"{masking_utils.__name__} of the installed transformers means another mask by {_name(plain)} than "
                    "the versions that this package was tried with; install another version of transformers"
                )

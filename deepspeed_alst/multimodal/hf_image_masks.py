"""Masks that a multimodal model makes of a whole batch: causal, and both ways within an image.

Legend: B batch, S whole sequence, D head dim; h query and k KV heads, g = h/k; t tokens of an image.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from deepspeed_alst.attention import blocked_sdpa
from deepspeed_alst.attention.hf_attention import AttentionBackend, causal_sdpa
from deepspeed_alst.attention.hf_masks import (
    AND,
    PACKED,
    MaskSpec,
    Rule,
    check_for_flash,
    check_parts,
    enclosed,
    read_mask,
)
from deepspeed_alst.core.selfcheck import run_isolated
from deepspeed_alst.errors import UnsupportedModelError

_OR = or_masks(causal_mask_function).__code__
_BLOCK = blockwise_overlay(torch.zeros(1, 1)).__code__
_CAUSAL = MaskSpec()
_WAY_OUT = "load the model with attn_implementation='sdpa', without alst.memory_lean_layer"


@dataclass(frozen=True)
class ImageMask(MaskSpec):
    """A mask whose images' tokens attend to all tokens of their image too."""

    base: MaskSpec = _CAUSAL
    """Mask of the other tokens."""
    images: tuple[tuple[tuple[int, int], ...], ...] = ()
    """First and last + 1 token of each image of each row."""
    length: int = 0
    in_window: bool = False
    """True if the window hides tokens of an image, False if it only hides others."""

    ndim = 4
    """Dims of the tensor that it stands for, which transformers asks a mask that a language model is given."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of that tensor."""
        return len(self.images), 1, self.length, self.length

    def runs(self, length: int) -> list[tuple[int, int]]:
        """Raise for other attention than sdpa's, which would leave out the images."""
        raise UnsupportedModelError(
            f"the tokens of an image attend to one another both ways, which only sdpa supports here: {_WAY_OUT}"
        )

    def rule(self, length: int, device: torch.device | str = "cpu") -> Rule:
        """Raise likewise."""
        self.runs(length)
        raise AssertionError

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, dropout: float
    ) -> torch.Tensor:
        """Attend under the mask: ``[B, h, S, D], 2 x [B, k, S, D] -> [B, h, S, D]``."""
        if self.base.hides_nothing(q.shape[2]):
            out = causal_sdpa(q, k, v, scaling, dropout)
        else:
            out = blocked_sdpa.attend(q, k, v, self.base, scaling, dropout)
        rows = []
        for row, images in enumerate(self.images):
            bounds = [0, *itertools.chain(*images), q.shape[2]]
            pieces = list(out[row : row + 1].split([end - start for start, end in itertools.pairwise(bounds)], dim=2))
            for place, (start, end) in enumerate(images):
                first = 0 if self.base.window is None else max(0, start - self.base.window + 1)
                qkv = q[row, :, start:end], k[row, :, first:end], v[row, :, first:end]
                pieces[2 * place + 1] = self._attend_image(start - first, *qkv, scaling, dropout)[None]
            rows.append(torch.cat(pieces, dim=2))
        return torch.cat(rows)

    def _attend_image(
        self, before: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, dropout: float
    ) -> torch.Tensor:
        """Attend from an image's tokens to it and the ``before`` tokens before it, ``[h, t, D]``."""
        # With a mask, sdpa's kernels do not support head groups.
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
        mask = None
        if self.base.window is not None:
            query = torch.arange(before, before + q.shape[1], device=q.device)[:, None]
            key = torch.arange(k.shape[1], device=q.device)
            mask = key > query - self.base.window
            mask = mask if self.in_window else mask | (key >= before)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling)


def mask_of_batch(
    mask_function: Callable[..., Any], rows: int, length: int, padding: Any, backend: AttentionBackend
) -> MaskSpec | None:
    """Return the mask of a whole batch that a multimodal model asks for; None for plain causal attention.

    Args:
        mask_function: transformers' function of indices.
        rows: batch size.
        length: tokens of the batch.
        padding: the batch's ``attention_mask``, ``[B, S]``, or None.
        backend: attention that gets the mask.

    Raises:
        UnsupportedModelError: padding on the left, packed documents, or parts of the mask that are not known.
    """
    check_parts()
    _check_images()
    if padding is not None and (padding.dim() != 2 or (padding[:, 1:].bool() & ~padding[:, :-1].bool()).any()):
        raise UnsupportedModelError(
            "the model makes its masks of the whole batch, whose attention_mask has holes or padding on the left: pad "
            "on the right (processor.tokenizer.padding_side = 'right')"
        )
    base, blocks_BS, in_window = _read(mask_function)
    if blocks_BS is None and not backend.uses_mask:  # windows are arguments of flash attention
        check_for_flash(backend.name, mask_function, length)
        return None
    if blocks_BS is None:
        return None if base.hides_nothing(length) else base
    if not backend.uses_mask:
        raise UnsupportedModelError(
            f"attn_implementation='{backend.name}' would hide an image's later tokens: {_WAY_OUT}"
        )
    if padding is not None:
        blocks_BS = blocks_BS.masked_fill(padding == 0, -1)
    images = tuple(map(_images, blocks_BS.expand(rows, -1)))
    return ImageMask(base=base, images=images, length=length, in_window=in_window)


def _read(mask_function: Callable[..., Any]) -> tuple[MaskSpec, torch.Tensor | None, bool]:
    """Return the mask without images, each token's image ``[B, S]``, and True if windows hide an image's tokens."""
    parts = enclosed(mask_function)["mask_functions"] if _code(mask_function) is AND else (mask_function,)
    if any(_code(part) is PACKED for part in parts):
        raise UnsupportedModelError("packed documents in a batch of images: give one document per row")
    unions = [part for part in parts if _code(part) is _OR]
    if not unions:
        return read_mask(mask_function), None, False
    functions = enclosed(unions[0])["mask_functions"]
    if len(unions) > 1 or len(functions) != 2 or _code(functions[1]) is not _BLOCK:
        raise UnsupportedModelError("the model's mask is a union of other masks than causal ones and images")
    others = [part for part in parts if part is not unions[0]]
    base = read_mask(and_masks(functions[0], *others))
    return base, enclosed(functions[1])["block_sequence_ids"], bool(others)


def _images(blocks_S: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Return first and last + 1 token of each image in a row; -1 marks text."""
    blocks, counts = blocks_S.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    found = [(end - n, end) for block, n, end in zip(blocks.tolist(), counts.tolist(), ends, strict=True) if block >= 0]
    if len(found) > len(set(blocks.tolist()) - {-1}):
        raise UnsupportedModelError("tokens that attend to one another both ways are not next to one another")
    return tuple(found)


def _code(function: Callable[..., Any]) -> Any:
    return getattr(function, "__code__", None)


@functools.cache
def _check_images() -> None:
    """Compare attention under the masks read with that under transformers' own functions."""
    run_isolated(_compare_images)


def _compare_images() -> None:
    blocks = torch.tensor([[-1, -1, 0, 0, 0, 0, -1, 1, 1, 1, -1, -1]])
    images, place = blockwise_overlay(blocks), torch.arange(12)
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 12, 4, dtype=torch.float64, generator=make) for heads in (4, 2, 2))
    for asked in (
        or_masks(causal_mask_function, images),
        or_masks(sliding_window_causal_mask_function(3), images),
        and_masks(or_masks(causal_mask_function, images), sliding_window_overlay(3)),
    ):
        base, blocks_BS, in_window = _read(asked)
        assert blocks_BS is not None
        mask = ImageMask(base=base, images=(_images(blocks_BS[0]),), in_window=in_window)
        dense = asked(torch.tensor(0), torch.tensor(0), place[:, None], place[None])
        expected = F.scaled_dot_product_attention(q, k, v, dense, enable_gqa=True)
        if not torch.allclose(mask.attend(q, k, v, None, 0.0), expected, rtol=1e-10, atol=1e-12):
            raise UnsupportedModelError(
                "transformers.masking_utils of the installed transformers builds other masks of images than the "
                "versions that were tested; install transformers 5.23 or 5.24"
            )

"""The local sum of a gradient reduction: P pieces of a slice, one of each rank, are added in one pass.

The op ``deepspeed_alst::sum_pieces`` is defined here, with its torch definition for every device; ``load_sum_pieces``
puts the compiled kernel of ``csrc/`` in its place where there is one.

P pieces, n elements of the slice.
"""

import torch

from deepspeed_alst.errors import ShapeError
from deepspeed_alst.ops.load import load

_NAME = "deepspeed_alst::sum_pieces"
_HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
# The reference works in parts of this many elements: adding bf16 to fp32 makes an fp32 copy of the bf16 on CPU.
_PART = 1 << 20


def sum_pieces_reference(pieces_Pn: torch.Tensor, out_n: torch.Tensor, scale: float, accumulate: bool = False) -> None:
    """The definition of ``sum_pieces`` in torch, and what runs where nothing is compiled: ``[P, n] -> [n]``.

    fp64 pieces are added in fp64, into fp64: a yardstick. Memory: two fp32 parts of 2**20 elements.

    Raises:
        ShapeError: sizes, strides, dtypes or devices that do not fit together.
    """
    _check(pieces_Pn, out_n)
    dtype = torch.promote_types(pieces_Pn.dtype, torch.float32)
    for begin in range(0, out_n.numel(), _PART):
        part = slice(begin, begin + _PART)
        total = pieces_Pn[0, part].to(dtype, copy=True)
        for piece_n in pieces_Pn[1:, part]:
            total += piece_n
        total *= scale
        if accumulate:
            total += out_n[part]
        out_n[part] = total


def _check(pieces_Pn: torch.Tensor, out_n: torch.Tensor) -> None:
    """Raise a ShapeError, with all that is known of both tensors, unless they fit together."""
    is_yardstick = pieces_Pn.dtype == out_n.dtype == torch.float64
    if pieces_Pn.dim() != 2 or pieces_Pn.shape[0] == 0:
        wrong = "pieces must be [P, n] with P >= 1"
    elif pieces_Pn.shape[1] > 1 and pieces_Pn.stride(1) != 1:
        wrong = "each piece must be contiguous (their distance may be any)"
    elif out_n.shape != pieces_Pn.shape[1:] or not out_n.is_contiguous():
        wrong = "out must be [n] and contiguous"
    elif not is_yardstick and not {pieces_Pn.dtype, out_n.dtype} <= set(_HALF_OR_SINGLE):
        wrong = f"pieces and out must be one of {', '.join(map(str, _HALF_OR_SINGLE))}, or both torch.float64"
    elif pieces_Pn.device != out_n.device:
        wrong = "pieces and out must be on one device"
    else:
        return
    raise ShapeError(
        f"sum_pieces: {wrong}; pieces are {list(pieces_Pn.shape)} with strides {list(pieces_Pn.stride())}, "
        f"{pieces_Pn.dtype} on {pieces_Pn.device}, out is {list(out_n.shape)}, {out_n.dtype} on {out_n.device}"
    )


def _fake(pieces_Pn: torch.Tensor, out_n: torch.Tensor, scale: float, accumulate: bool) -> None:
    """What the op does to tensors without data: nothing, once they fit together."""
    _check(pieces_Pn, out_n)


_library = torch.library.Library("deepspeed_alst", "FRAGMENT")
_library.define("sum_pieces(Tensor pieces, Tensor(a!) out, float scale, bool accumulate) -> ()")
_library.impl("sum_pieces", sum_pieces_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)


def load_sum_pieces(device_type: str) -> str:
    """Put the compiled op in place for ``"cpu"`` or ``"cuda"``, and say in words what will add (``ops.load.load``)."""
    return load("sum_pieces", device_type, "the sum of gradient pieces")


def sum_pieces(pieces_Pn: torch.Tensor, out_n: torch.Tensor, scale: float, accumulate: bool = False) -> None:
    """Add P pieces in one pass: ``[P, n] -> [n]``, ``out = scale * (((p0 + p1) + p2) + ...)``.

    Pieces are bf16, fp16 or fp32, and added in fp32 in this order; the result is rounded once, to nearest even, to
    bf16, fp16 or fp32. Infinities and NaNs go through (which NaN comes out is not promised). The compiled op and the
    definition in torch agree bit by bit.

    Args:
        pieces_Pn: each piece contiguous; the distance between two pieces may be larger than n.
        out_n: contiguous; its address need be a multiple of its element's size only. Shares no memory with the pieces.
        scale: what the sum is multiplied by, as fp32.
        accumulate: ``out = out + scale * (...)`` instead, added in fp32 and rounded once.

    Raises:
        ShapeError: sizes, strides, dtypes or devices that do not fit together.
    """
    _check(pieces_Pn, out_n)
    if pieces_Pn.dtype == torch.float64:  # a yardstick: the compiled op does not know it
        sum_pieces_reference(pieces_Pn, out_n, scale, accumulate)
    else:
        torch.ops.deepspeed_alst.sum_pieces(pieces_Pn, out_n, scale, accumulate)

"""Local sum of a gradient reduction: adds P pieces of a slice, one per rank, in one pass.

The op ``deepspeed_alst::sum_pieces`` is defined here, with a PyTorch reference for every device; ``load_sum_pieces``
replaces it by the compiled kernel of ``csrc/`` if available.

Legend: P pieces, n elements of the slice.
"""

import torch

from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels.builder import load

_NAME = "deepspeed_alst::sum_pieces"
_HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)
# Elements per step of the reference: adding bf16 to fp32 makes an fp32 copy of the bf16 on CPU.
_PART = 1 << 20


def sum_pieces_reference(pieces_Pn: torch.Tensor, out_n: torch.Tensor, scale: float, accumulate: bool = False) -> None:
    """Compute ``sum_pieces`` in PyTorch, as reference and fallback: ``[P, n] -> [n]``.

    fp64 pieces are summed in fp64, as ground truth. Memory: two fp32 parts of 2**20 elements.

    Raises:
        ShapeError: incompatible sizes, strides, dtypes or devices.
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
    """Raise a ShapeError that describes both tensors, unless they are compatible."""
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
    """Check the tensors; the op does nothing else on fake tensors."""
    _check(pieces_Pn, out_n)


_library = torch.library.Library("deepspeed_alst", "FRAGMENT")
_library.define("sum_pieces(Tensor pieces, Tensor(a!) out, float scale, bool accumulate) -> ()")
_library.impl("sum_pieces", sum_pieces_reference, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)


def load_sum_pieces(device_type: str) -> str:
    """Load the compiled op for ``"cpu"`` or ``"cuda"``, and return which one will compute."""
    return load(device_type)


def sum_pieces(pieces_Pn: torch.Tensor, out_n: torch.Tensor, scale: float, accumulate: bool = False) -> None:
    """Add P pieces in one pass: ``[P, n] -> [n]``, ``out = scale * (((p0 + p1) + p2) + ...)``.

    bf16, fp16 or fp32 pieces are added in fp32 in this order; the result is rounded once, to nearest even, to bf16,
    fp16 or fp32. Inf and NaN propagate (which NaN is not specified). The compiled op and the reference agree bit by
    bit.

    Args:
        pieces_Pn: each piece contiguous; the stride between pieces may be larger than n.
        out_n: contiguous; alignment to its element size suffices. Must not overlap the pieces.
        scale: fp32 factor of the sum.
        accumulate: ``out = out + scale * (...)`` instead, added in fp32 and rounded once.

    Raises:
        ShapeError: incompatible sizes, strides, dtypes or devices.
    """
    _check(pieces_Pn, out_n)
    if pieces_Pn.dtype == torch.float64:  # fp64 is ground truth only; the compiled op does not support it
        sum_pieces_reference(pieces_Pn, out_n, scale, accumulate)
    else:
        torch.ops.deepspeed_alst.sum_pieces(pieces_Pn, out_n, scale, accumulate)

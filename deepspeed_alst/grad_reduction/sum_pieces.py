"""Op ``deepspeed_alst::sum_pieces``: add P pieces of a slice of n elements, one per rank, in one pass.

It is defined here in PyTorch, for every device; ``kernels.builder.load`` registers the kernel of ``csrc/`` instead.
"""

import torch

from deepspeed_alst.errors import ShapeError

_HALF_OR_SINGLE = {torch.bfloat16, torch.float16, torch.float32}
# Elements per step of the reference: adding bf16 to fp32 makes an fp32 copy of the bf16 on CPU.
_PART = 1 << 20


def sum_pieces_reference(pieces_Pn: torch.Tensor, out_n: torch.Tensor, scale: float, accumulate: bool = False) -> None:
    """Compute ``sum_pieces`` in PyTorch; fp64 pieces in fp64, as ground truth."""
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
    dtypes = {pieces_Pn.dtype, out_n.dtype}
    fits = (
        pieces_Pn.dim() == 2
        and pieces_Pn.shape[0] > 0
        and (pieces_Pn.shape[1] <= 1 or pieces_Pn.stride(1) == 1)
        and out_n.shape == pieces_Pn.shape[1:]
        and out_n.is_contiguous()
        and (dtypes <= _HALF_OR_SINGLE or dtypes == {torch.float64})
        and pieces_Pn.device == out_n.device
    )
    if not fits:
        raise ShapeError(
            "sum_pieces: pieces must be [P, n], each contiguous, out must be [n] and contiguous, both in bf16, fp16 or "
            f"fp32, or both in fp64, on one device; pieces are {list(pieces_Pn.shape)} with strides "
            f"{list(pieces_Pn.stride())}, {pieces_Pn.dtype} on {pieces_Pn.device}, out is {list(out_n.shape)} with "
            f"strides {list(out_n.stride())}, {out_n.dtype} on {out_n.device}"
        )


_library = torch.library.Library("deepspeed_alst", "FRAGMENT")
_library.define("sum_pieces(Tensor pieces, Tensor(a!) out, float scale, bool accumulate) -> ()")
_library.impl("sum_pieces", sum_pieces_reference, "CompositeExplicitAutograd")
torch.library.register_fake(
    "deepspeed_alst::sum_pieces", lambda pieces, out, scale, accumulate: _check(pieces, out), lib=_library
)


def sum_pieces(pieces_Pn: torch.Tensor, out_n: torch.Tensor, scale: float, accumulate: bool = False) -> None:
    """Add P pieces in one pass: ``[P, n] -> [n]``, ``out = scale * (((p0 + p1) + p2) + ...)``.

    bf16, fp16 or fp32 pieces are added in fp32 in this order; the result is rounded once, to nearest even, to bf16,
    fp16 or fp32. Inf and NaN propagate (which NaN is not specified). The compiled op and the reference agree bit by
    bit. Each piece is contiguous; ``out_n`` too, and must not overlap them. With ``accumulate``,
    ``out = out + scale * (...)``, added in fp32 and rounded once.

    Raises:
        ShapeError: incompatible sizes, strides, dtypes or devices.
    """
    _check(pieces_Pn, out_n)
    if pieces_Pn.dtype == torch.float64:  # fp64 is ground truth only; the compiled op does not support it
        sum_pieces_reference(pieces_Pn, out_n, scale, accumulate)
    else:
        torch.ops.deepspeed_alst.sum_pieces(pieces_Pn, out_n, scale, accumulate)

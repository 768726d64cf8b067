"""Counter-based random numbers: each is a hash of a key, a row and a column, without generator state.

The key encodes the position in the training, the row is a token of the whole sequence. So a token gets the same
numbers on any rank, in any tile and in the recomputation; no mask is saved for the backward.

Legend: N rows, C columns.
"""

import hashlib
import math
from typing import Any

import torch

_TILE_ELEMENTS = 2**22  # elements of random bits at a time
# Random bits per uniform number: the precision of the dtype below 1.
_DIGITS = {torch.float64: 31, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def key_of(*parts: Any) -> int:
    """Hash the parts that identify a draw to 63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def uniform(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw from [0, 1): ``[N] -> [N, C]``, in steps of the dtype's precision."""
    return _fractions(key, rows_N, columns, dtype, _DIGITS[dtype]).mul_(2.0 ** -_DIGITS[dtype])


def exponential(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw from the exponential distribution of mean 1, never 0: ``[N] -> [N, C]``."""
    return _inside(key, rows_N, columns, dtype).log_().neg_().to(dtype)


def normal(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw from the normal distribution of mean 0 and variance 1: ``[N] -> [N, C]``."""
    radius = _inside(key_of(key, "radius"), rows_N, columns, dtype).log_().mul_(-2).sqrt_()
    return _inside(key, rows_N, columns, dtype).mul_(2 * math.pi).cos_().mul_(radius).to(dtype)


def dropout(x: torch.Tensor, p: float, key: int, rows_N: torch.Tensor) -> torch.Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p): ``[...] -> [...]``.

    Args:
        x: ``[N, ...]``, or with its rows in several dims.
        p: dropout probability, 0 to 1.
        key: key of the draw.
        rows_N: counter of each row.
    """
    return CountedDropout.apply(x, p, key, rows_N)


class CountedDropout(torch.autograd.Function):
    """Autograd function of ``dropout``: ``apply(x, p, key, rows_N)``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, key: int, rows_N: torch.Tensor) -> torch.Tensor:
        """Drop and scale; save only the arguments that regenerate the mask."""
        ctx.draw = p, key, rows_N
        if p == 1:
            return torch.zeros_like(x)
        x_NC = x.reshape(len(rows_N), -1)
        result_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
        threshold = round(p * 2**32) - 2**31
        for part in _parts(*x_NC.shape):
            dropped = _bits(key, rows_N[part], x_NC.shape[1]) < threshold
            torch.mul(x_NC[part], 1 / (1 - p), out=result_NC[part]).masked_fill_(dropped, 0)
        return result_NC.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Regenerate the mask and apply it to the gradient."""
        return CountedDropout.apply(grad, *ctx.draw), None, None, None


def _inside(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw uniform numbers in (0, 1), both ends excluded, in fp32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    digits = _DIGITS[dtype] - 1
    return _fractions(key, rows_N, columns, dtype, digits).add_(0.5).mul_(2.0**-digits)


def _fractions(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype, digits: int) -> torch.Tensor:
    """Draw integers below ``2**digits``."""
    result_NC = torch.empty(len(rows_N), columns, dtype=dtype, device=rows_N.device)
    for part in _parts(len(rows_N), columns):
        bits = _bits(key, rows_N[part], columns)
        result_NC[part] = bits.bitwise_right_shift_(32 - digits).bitwise_and_(2**digits - 1)
    return result_NC


def _parts(rows: int, columns: int) -> list[slice]:
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _bits(key: int, rows_N: torch.Tensor, columns: int) -> torch.Tensor:
    """Draw 32 random bits per row and column: ``[N] -> [N, C]`` int32."""
    of_row_N = _mixed(rows_N, key)
    of_column_C = _mixed(torch.arange(columns, device=rows_N.device), ~key)
    # Both halves of a row's 64 bits are used: by one half, two in a million rows would collide.
    bits_NC = of_row_N.to(torch.int32)[:, None] + of_column_C.to(torch.int32)
    _xor_shift(bits_NC, 16).mul_(0x7FEB352D)
    bits_NC += (of_row_N >> 32).to(torch.int32)[:, None]
    _xor_shift(bits_NC, 15).mul_(0x846CA68B - 2**32)
    return _xor_shift(bits_NC, 16)


def _mixed(x: torch.Tensor, key: int) -> torch.Tensor:
    """Hash each number to 64 random bits: ``[N] -> [N]`` int64, with wraparound."""
    x = (x.to(torch.int64) + key) * -0x61C8864680B583EB
    x = _xor_shift(x, 30) * -0x40A7B892E31B1A47
    x = _xor_shift(x, 27) * -0x6B2FB644ECCEEE15
    return _xor_shift(x, 31)


def _xor_shift(x: torch.Tensor, by: int) -> torch.Tensor:
    """Compute ``x ^= x >> by`` in place, as a logical shift."""
    return x.bitwise_xor_((x >> by).bitwise_and_(2 ** (8 * x.element_size() - by) - 1))

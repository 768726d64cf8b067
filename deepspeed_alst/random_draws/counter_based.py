"""Counter-based random numbers, each a hash of a key, a row and a column, and torch's random functions made of them.

The key encodes the position in the training, the row is a token of the whole sequence. So a token gets the same
numbers on any rank, in any tile and in the recomputation; no mask is saved for the backward.

Legend: N rows, C columns.
"""

import hashlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.errors import UnsupportedModelError

_TILE_ELEMENTS = 2**22  # elements of random bits at a time
# Random bits per uniform number: the precision of the dtype below 1.
_DIGITS = {torch.float64: 31, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def key_of(*parts: Any) -> int:
    """Hash the parts that identify a draw to 63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def uniform(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype, first: int = 0) -> torch.Tensor:
    """Draw from [0, 1): ``[N] -> [N, C]``, of the columns from ``first`` on, in steps of the dtype's precision."""
    return _fractions(key, rows_N, columns, dtype, _DIGITS[dtype], first).mul_(2.0 ** -_DIGITS[dtype])


def attention_keeps(key: int, samples: range, heads: range, rows: range, keys: range, p: float, device: Any) -> Any:
    """Draw which of attention's weights dropout keeps, each with probability p: ``[B, h, R, N]``."""
    of = [torch.arange(each.start, each.stop, device=device) for each in (samples, heads, rows)]
    rows_BhR = (of[0][:, None, None] * 2**16 + of[1][:, None]) * 2**32 + of[2]
    u_RN = uniform(key, rows_BhR.flatten(), len(keys), torch.float32, keys.start)
    return (u_RN < p).view(*rows_BhR.shape, len(keys))


def exponential(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw from the exponential distribution of mean 1, never 0: ``[N] -> [N, C]``."""
    return _inside(key, rows_N, columns, dtype).log_().neg_().to(dtype)


def normal(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw from the normal distribution of mean 0 and variance 1: ``[N] -> [N, C]``."""
    radius = _inside(key_of(key, "radius"), rows_N, columns, dtype).log_().mul_(-2).sqrt_()
    return _inside(key, rows_N, columns, dtype).mul_(2 * math.pi).cos_().mul_(radius).to(dtype)


def dropout(x: torch.Tensor, p: float, key: int, rows_N: torch.Tensor) -> torch.Tensor:
    """Zero each element with probability p and scale the others by 1 / (1 - p): ``[N, ...]``, N in one dim or more."""
    return CountedDropout.apply(x, p, key, rows_N)


class CountedDropout(torch.autograd.Function):
    """Autograd function of ``dropout``, matched by its node's name in tiling/tiled_mlp.py."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float, key: int, rows_N: torch.Tensor) -> torch.Tensor:
        """Drop and scale."""
        ctx.draw = p, key, rows_N  # regenerates the mask
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
        """Drop and scale alike."""
        return CountedDropout.apply(grad, *ctx.draw), None, None, None


def _inside(key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Draw uniform numbers in (0, 1), both ends excluded, in fp32 at least."""
    dtype = torch.promote_types(dtype, torch.float32)
    digits = _DIGITS[dtype] - 1
    return _fractions(key, rows_N, columns, dtype, digits).add_(0.5).mul_(2.0**-digits)


def _fractions(
    key: int, rows_N: torch.Tensor, columns: int, dtype: torch.dtype, digits: int, first: int = 0
) -> torch.Tensor:
    """Draw integers below ``2**digits``."""
    result_NC = torch.empty(len(rows_N), columns, dtype=dtype, device=rows_N.device)
    for part in _parts(len(rows_N), columns):
        bits = _bits(key, rows_N[part], columns, first)
        result_NC[part] = bits.bitwise_right_shift_(32 - digits).bitwise_and_(2**digits - 1)
    return result_NC


def _parts(rows: int, columns: int) -> list[slice]:
    step = max(1, _TILE_ELEMENTS // max(1, columns))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _bits(key: int, rows_N: torch.Tensor, columns: int, first: int = 0) -> torch.Tensor:
    """Draw 32 random bits per row and column: ``[N] -> [N, C]`` int32."""
    of_row_N = _mixed(rows_N, key)
    of_column_C = _mixed(torch.arange(first, first + columns, device=rows_N.device), ~key)
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


# --- torch's functions: each is given the mode (random_draws/draw_mode.py), the function and the arguments of the call

_Draw = Callable[[int, torch.Tensor, int, torch.dtype], torch.Tensor]


def _dropout(mode: Any, func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p <= 1:
        return func(input, p, training, inplace)
    # A weight has no token dim.
    is_weight = isinstance(input, torch.nn.Parameter)
    key, rows_N = mode.place.at(input.shape[:1] if is_weight else input.shape, not is_weight, input.device)
    result = dropout(input, p, key, rows_N)
    return input.copy_(result) if inplace else result


def _torch_dropout(mode: Any, func: Any, input: torch.Tensor, p: float, train: bool) -> Any:
    return _dropout(mode, F.dropout, input, p, train, inplace=func is torch.dropout_)


def _other_dropout(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    draws_none = not given.arguments["training"] or not given.arguments["p"]
    return func(*args, **kwargs) if draws_none else _refuse(mode, func)


def _attention(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    if not kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0):
        return func(*args, **kwargs)
    with mode.attention((args[0] if args else kwargs["query"]).device):
        return func(*args, **kwargs)


def _uniform_(mode: Any, func: Any, x: torch.Tensor, low: Any = 0.0, high: Any = 1.0, **kwargs: Any) -> torch.Tensor:
    low, high = kwargs.get("from", low), kwargs.get("to", high)
    return x.copy_(_drawn(mode, x, uniform) * (high - low) + low)


def _exponential_(mode: Any, func: Any, x: torch.Tensor, lambd: float = 1.0, **kwargs: Any) -> torch.Tensor:
    return x.copy_(_drawn(mode, x, exponential) / lambd)


def _normal_(mode: Any, func: Any, x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: Any) -> torch.Tensor:
    return x.copy_(_drawn(mode, x, normal) * std + mean)


def _bernoulli_(mode: Any, func: Any, x: torch.Tensor, p: Any = 0.5, **kwargs: Any) -> torch.Tensor:
    return x.copy_(_drawn(mode, x, uniform, torch.float32) < p)


def _bernoulli(mode: Any, func: Any, x: torch.Tensor, p: Any = None, **kwargs: Any) -> torch.Tensor:
    return _bernoulli_(mode, func, torch.empty_like(x), x if p is None else p)


def _new_like(draw: _Draw) -> Any:
    def counted(mode: Any, func: Any, input: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = torch.empty_like(input, **kwargs)
        return x.detach().copy_(_drawn(mode, x, draw)).requires_grad_(x.requires_grad)

    return counted


def _new(draw: _Draw) -> Any:
    def counted(mode: Any, func: Any, *size: Any, generator: None = None, **kwargs: Any) -> torch.Tensor:
        x = torch.empty(*size, **kwargs)
        return x.detach().copy_(_drawn(mode, x, draw, of_tensor=False)).requires_grad_(x.requires_grad)

    return counted


def _permutation(mode: Any, func: Any, n: int, generator: None = None, **kwargs: Any) -> torch.Tensor:
    result_N = torch.empty(n, **{"dtype": torch.int64, **kwargs})
    return result_N.copy_(_drawn(mode, result_N, uniform, torch.float64, of_tensor=False).argsort(stable=True))


def _drawn(
    mode: Any, x: torch.Tensor, draw: _Draw, dtype: torch.dtype | None = None, of_tensor: bool = True
) -> torch.Tensor:
    """Draw numbers of a tensor's shape, on its device."""
    key, rows_N = mode.place.at(x.shape, of_tensor, x.device)
    return draw(key, rows_N, x.numel() // max(1, len(rows_N)), dtype or x.dtype).view(x.shape)


def _refuse(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedModelError(
        f"the model draws random numbers by {func.__name__}, which is not available under sequence parallelism: the "
        "ranks would draw different numbers than one sequence. Use dropout, rand, randn, bernoulli or exponential_, or "
        "set its rate to 0"
    )


COUNTED: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _torch_dropout,
    torch.dropout_: _torch_dropout,
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.exponential_: _exponential_,
    torch.Tensor.normal_: _normal_,
    torch.Tensor.bernoulli_: _bernoulli_,
    torch.Tensor.bernoulli: _bernoulli,
    torch.bernoulli: _bernoulli,
    torch.rand_like: _new_like(uniform),
    torch.randn_like: _new_like(normal),
    torch.rand: _new(uniform),
    torch.randn: _new(normal),
    torch.randperm: _permutation,
}
_OTHER_DROPOUTS = (F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d)
COUNTED |= dict.fromkeys(_OTHER_DROPOUTS, _other_dropout) | dict.fromkeys(
    (
        *(torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, torch.native_dropout),
        *(F.gumbel_softmax, torch.rrelu, torch.multinomial, torch.poisson, torch.binomial, torch.normal),
        *(torch.randint, torch.randint_like, torch.Tensor.multinomial, torch.Tensor.random_),
        *(torch.Tensor.geometric_, torch.Tensor.cauchy_, torch.Tensor.log_normal_),
    ),
    _refuse,
)

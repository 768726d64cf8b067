"""Counter-based versions of torch's random functions; unsupported ones raise UnsupportedModelError.

Each is called with the mode (random_draws/draw_mode.py), torch's function and the arguments of the call.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.random_draws import counter_based as draws

_Draw = Callable[[int, torch.Tensor, int, torch.dtype], torch.Tensor]


def _dropout(mode: Any, func: Any, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p <= 1:
        return func(input, p, training, inplace)
    # A weight has no token dim.
    is_weight = isinstance(input, torch.nn.Parameter)
    key, rows_N = mode.at(input.shape[:1] if is_weight else input.shape, not is_weight, input.device)
    result = draws.dropout(input, p, key, rows_N)
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
    return x.copy_(_like(mode, x, draws.uniform) * (high - low) + low)


def _exponential_(mode: Any, func: Any, x: torch.Tensor, lambd: float = 1.0, **kwargs: Any) -> torch.Tensor:
    return x.copy_(_like(mode, x, draws.exponential) / lambd)


def _normal_(mode: Any, func: Any, x: torch.Tensor, mean: float = 0.0, std: float = 1.0, **kwargs: Any) -> torch.Tensor:
    return x.copy_(_like(mode, x, draws.normal) * std + mean)


def _bernoulli_(mode: Any, func: Any, x: torch.Tensor, p: Any = 0.5, **kwargs: Any) -> torch.Tensor:
    return x.copy_(_like(mode, x, draws.uniform, torch.float32) < p)


def _bernoulli(mode: Any, func: Any, x: torch.Tensor, p: Any = None, **kwargs: Any) -> torch.Tensor:
    return _bernoulli_(mode, func, torch.empty_like(x), x if p is None else p)


def _new_like(draw: _Draw) -> Any:
    def counted(mode: Any, func: Any, input: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = torch.empty_like(input, **kwargs)
        return x.detach().copy_(_like(mode, x, draw)).requires_grad_(x.requires_grad)

    return counted


def _new(draw: _Draw) -> Any:
    """Make a counter-based ``torch.rand(sizes)``, for a new tensor not shaped like an existing one."""

    def counted(mode: Any, func: Any, *size: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("generator", None)
        x = torch.empty(*size, **kwargs)
        return x.detach().copy_(_drawn(mode, x, draw, x.dtype, of_tensor=False)).requires_grad_(x.requires_grad)

    return counted


def _permutation(mode: Any, func: Any, n: int, **kwargs: Any) -> torch.Tensor:
    kwargs.pop("generator", None)
    result_N = torch.empty(n, **{"dtype": torch.int64, **kwargs})
    return result_N.copy_(_drawn(mode, result_N, draws.uniform, torch.float64, of_tensor=False).argsort(stable=True))


def _like(mode: Any, x: torch.Tensor, draw: _Draw, dtype: torch.dtype | None = None) -> torch.Tensor:
    return _drawn(mode, x, draw, dtype or x.dtype, of_tensor=True)


def _drawn(mode: Any, x: torch.Tensor, draw: _Draw, dtype: torch.dtype, of_tensor: bool) -> torch.Tensor:
    """Draw numbers of a tensor's shape, on its device."""
    key, rows_N = mode.at(x.shape, of_tensor, x.device)
    return draw(key, rows_N, x.numel() // max(1, len(rows_N)), dtype).view(x.shape)


def _refuse(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    raise UnsupportedModelError(
        f"the model draws random numbers by {func.__name__}, which is not available under sequence parallelism: its "
        "ranks would not draw those of one sequence. Use dropout, rand, randn, bernoulli or exponential_ instead, or "
        "switch it off"
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
    torch.rand_like: _new_like(draws.uniform),
    torch.randn_like: _new_like(draws.normal),
    torch.rand: _new(draws.uniform),
    torch.randn: _new(draws.normal),
    torch.randperm: _permutation,
}
COUNTED |= dict.fromkeys(
    (F.alpha_dropout, F.feature_alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d), _other_dropout
)
COUNTED |= dict.fromkeys(
    (
        *(torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, torch.native_dropout),
        *(F.gumbel_softmax, torch.rrelu, torch.multinomial, torch.poisson, torch.binomial, torch.normal),
        *(torch.randint, torch.randint_like, torch.Tensor.multinomial, torch.Tensor.random_),
        *(torch.Tensor.geometric_, torch.Tensor.cauchy_, torch.Tensor.log_normal_),
    ),
    _refuse,
)

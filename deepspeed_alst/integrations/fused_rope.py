"""Rotary embedding of a model's attention by kernels/rope.py instead of transformers' function.

An attention class's forward looks up ``apply_rotary_pos_emb`` in the globals of its source file. A module's forward is
therefore replaced by a copy that finds a dispatcher under that name. It uses the op only for kinds of tensors for which
the function, on random tensors, gave the result of a form of the op.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from deepspeed_alst.core.function_copies import with_names
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import is_equivalent, is_plain, random_tensors, result_or_none
from deepspeed_alst.kernels.rope import DTYPES, rope
from deepspeed_alst.kernels.rope_ops import rope_reference

_NAME = "apply_rotary_pos_emb"
_ARGUMENTS = ["q", "k", "cos", "sin"]
_HEADS_DIM = "unsqueeze_dim"

_How = tuple[int, bool, bool]
"""Arguments of the op: number of rotated elements, interleaved, shared."""


def fuse_rope(model: torch.nn.Module, patches: PatchSet) -> dict[str, int]:
    """Make a model's attention rotate by the op; return the count per class. ``patches.close()`` undoes it.

    A module with an instance forward stays unchanged.
    """
    fused: dict[str, int] = {}
    for module in model.modules():
        forward = type(module).forward
        if "forward" in vars(module) or (copy := with_names(forward, _names_for)) is forward:
            continue
        # A method, so that a copy of the module runs it on itself.
        patches.forward(module, _unless_compiled(copy, forward))
        name = type(module).__name__
        fused[name] = fused.get(name, 0) + 1
    return fused


def _names_for(function: types.FunctionType) -> dict[str, Any]:
    if _NAME not in function.__code__.co_names:
        return {}
    original = function.__globals__.get(_NAME)
    rotary = _rotary_of(original) if inspect.isfunction(original) else None
    return {} if rotary is None else {_NAME: rotary}


def _unless_compiled(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (plain if torch.compiler.is_compiling() else fused)(self, *args, **kwargs)

    return forward


@functools.cache
def _rotary_of(original: Callable[..., Any]) -> "_Rotary | None":
    """Return a function's dispatcher, shared by all callers; None if the function has no known form."""
    rotary = _Rotary(original)
    return rotary if rotary.is_known() else None


class _Rotary:
    """Dispatcher that replaces a function ``(q, k, cos, sin, ...) -> (q, k)``.

    Args:
        original: the replaced function.
    """

    def __init__(self, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.original = original
        self._signature = inspect.signature(original)
        self._proven: dict[Any, _How | None] = {}

    def is_known(self) -> bool:
        """Return True if the function has a known form that rotates all of a head or half of it."""
        if list(self._signature.parameters)[: len(_ARGUMENTS)] != _ARGUMENTS:
            return False
        return any(self._how_for(torch.float32, torch.float32, 16, W, True, None) is not None for W in (16, 8))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Rotate by the op if its form is proven, else by the original function."""
        given = self._signature.bind(*args, **kwargs).arguments
        tensors = [given.get(name) for name in _ARGUMENTS]
        heads_dim = self._heads_dim(given)
        if heads_dim is None or not _fit(*tensors, heads_dim):
            return self.original(*args, **kwargs)
        q, k, cos, sin = tensors
        how = self._how_for(
            q.dtype, cos.dtype, q.shape[3], cos.shape[2], cos.shape[0] == 1, heads_dim if _HEADS_DIM in given else None
        )
        if how is None:
            return self.original(*args, **kwargs)
        turned = rope(_tokens_first(q, heads_dim), _tokens_first(k, heads_dim), cos, sin, *how)
        return tuple(_tokens_first(each, heads_dim) for each in turned)

    def _how_for(self, *key: Any) -> _How | None:
        """Return the form of the op for a kind of tensors; proven once."""
        if key not in self._proven:
            *kind, heads_dim = key
            more = {} if heads_dim is None else {_HEADS_DIM: heads_dim}
            function = functools.partial(self.original, **more)
            self._proven[key] = result_or_none(_how, function, *kind, self._heads_dim(dict.fromkeys(_ARGUMENTS) | more))
        return self._proven[key]

    def _heads_dim(self, given: dict[str, Any]) -> int | None:
        """Return the heads dim of q and k; None if the call has arguments that the op does not support."""
        if list(given)[: len(_ARGUMENTS)] != _ARGUMENTS or set(given) - {*_ARGUMENTS, _HEADS_DIM}:
            return None
        parameter = self._signature.parameters.get(_HEADS_DIM)
        return given.get(_HEADS_DIM, 1 if parameter is None else parameter.default)


def _fit(q: Any, k: Any, cos: Any, sin: Any, heads_dim: Any) -> bool:
    """Return True if the op accepts these tensors, whatever the function computes."""
    if heads_dim not in (1, 2) or not all(is_plain(each) for each in (q, k, cos, sin)):
        return False
    if (q.dim(), k.dim(), cos.dim()) != (4, 4, 3) or sin.shape != cos.shape or sin.dtype != cos.dtype:
        return False
    B, s = q.shape[0], q.shape[3 - heads_dim]
    one_size = (k.shape[0], k.shape[3 - heads_dim], k.shape[3], cos.shape[1]) == (B, s, q.shape[3], s)
    one_kind = q.dtype == k.dtype and q.device == k.device == cos.device == sin.device
    known = q.dtype in DTYPES and cos.dtype in DTYPES and not cos.requires_grad and not sin.requires_grad
    return one_size and one_kind and known and cos.shape[0] in (1, B)


def _tokens_first(x: torch.Tensor, heads_dim: int) -> torch.Tensor:
    """Transpose ``[B, heads, s, D] -> [B, s, heads, D]`` and back if ``heads_dim`` is 1."""
    return x.transpose(1, 2) if heads_dim == 1 else x


def _how(
    function: Callable[..., Any], dtype: torch.dtype, of_tables: torch.dtype, D: int, W: int, one: bool, heads_dim: int
) -> _How | None:
    """Return the form of the op that a function computes, within roundings: in these dtypes, in fp32, and backward."""
    forms = [(W, interleaved, shared) for interleaved in (False, True) for shared in (False, True)]
    forms += [(2 * W, interleaved, True) for interleaved in (False, True)]
    for how in forms:
        kinds = ((torch.float32, torch.float32), (dtype, of_tables))
        if not how[0] % 2 and how[0] <= D and all(_turns(function, how, *kind, D, W, one, heads_dim) for kind in kinds):
            return how
    return None


def _turns(
    function: Callable[..., Any],
    how: _How,
    dtype: torch.dtype,
    of_tables: torch.dtype,
    D: int,
    W: int,
    one: bool,
    heads_dim: int,
) -> bool:
    draw, (B, s, h, g) = random_tensors(), (2, 5, 3, 2)

    def tokens_first(*inputs: torch.Tensor) -> list[torch.Tensor]:
        q, k, *tables = inputs
        turned = function(_tokens_first(q, heads_dim), _tokens_first(k, heads_dim), *tables)
        return [_tokens_first(each, heads_dim) for each in turned]

    q, k = (draw(B, s, heads, D).to(dtype).requires_grad_() for heads in (h, g))
    tables = (draw(1 if one else B, s, W).to(of_tables) for _ in "cs")
    return is_equivalent(tokens_first, lambda *inputs: rope_reference(*inputs, *how), (q, k, *tables), 8, 8)

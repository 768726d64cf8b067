"""Tensors that no rank makes whole: features of images, each with one rank, and the embeddings that they are put into.

A model's merge gets them in place of ``[N, M]`` and ``[B, S, M]``, and calls its language model with what it has made
of them, where each rank makes the rows of its own tokens. An op that is not known gets whole tensors, on all ranks.

Legend: B batch, S whole sequence, P ranks of a sequence, M model dim; k features of each rank (those with fewer are
padded), N features of all images, m those that one rank asks for.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_iter, tree_map_only

from deepspeed_alst.attention.ulysses import exchange
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import name_missing_ranks
from deepspeed_alst.distributed.gather import gather_tokens
from deepspeed_alst.distributed.mesh import SequenceGroups
from deepspeed_alst.errors import DataError
from deepspeed_alst.whole_sequence.token_functions import SHAPE_QUERIES

_VALUES = ("data", "grad", "T", "mT", "H", "mH", "real", "imag")
_RESHAPES = ("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous")


class Deferred(torch.Tensor):
    """Tensor whose values are not made; a function that is not known gets the whole tensor."""

    made: torch.Tensor | None = None

    @staticmethod
    def __new__(cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> "Deferred":
        """Create a tensor without storage."""
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """Return class, shape and dtype: the values are on other ranks."""
        return f"{type(self).__name__}(shape={list(self.shape)}, dtype={self.dtype})"

    def whole(self) -> torch.Tensor:
        """Return the whole tensor, with its gradient; ops in place change it, and later ones see that."""
        self.made = self.make() if self.made is None else self.made
        return self.made

    def make(self) -> torch.Tensor:
        """Make the whole tensor. Collective if it has features of images."""
        raise NotImplementedError

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a function whose first argument this is, or a list with it; NotImplemented if it is not known."""
        raise NotImplementedError

    def is_cast(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Return True if ``to`` with these arguments would change the dtype or the device."""
        with torch._C.DisableTorchFunctionSubclass():
            asked = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return (asked.dtype, asked.device) != (self.dtype, self.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name in SHAPE_QUERIES or (name == "__get__" and func.__self__.__name__ not in _VALUES):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if name == "expand_as" and not isinstance(args[0], Deferred):
            return args[0].expand(args[1].shape)
        given = [each for each in tree_iter(args[:1]) if isinstance(each, Deferred)]
        with torch._C.DisableTorchFunctionSubclass():
            if any(each.requires_grad for each in given):  # what an autograd.Function returned
                raise DataError(f"{name} of images' features or embeddings after a function that has no gradient here")
        if given and all(each.made is None for each in given):
            found = given[0].run(func, args, kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map_only(Deferred, Deferred.whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0].detach()  # ZeRO's, of what a module returned
        raise DataError(f"{func} was called with features or embeddings whose values are not made")


@dataclass(frozen=True, eq=False)
class Shares:
    """Features of all images, of which each rank has those of its own, ``[k, M]``."""

    own: torch.Tensor
    groups: SequenceGroups

    @cached_property
    def whole(self) -> torch.Tensor:
        """Those of all ranks, ``[P*k, M]``, with their gradient."""
        with name_missing_ranks(self.groups.roll_group):
            return gather_tokens(self.own[None], self.groups.sp_group)[0]

    def fetch(self, places_m: torch.Tensor) -> torch.Tensor:
        """Return the features at these places in ``whole``, ``[m, M]``, with their gradient; other ranks ask theirs."""
        group, size = self.groups.sp_group, len(self.own)
        owners_m, order_m = torch.sort(places_m // size, stable=True)
        with name_missing_ranks(self.groups.roll_group):
            asked_P = torch.bincount(owners_m, minlength=self.groups.sp_size)
            asked, given = asked_P.tolist(), exchange(asked_P, group).tolist()
            rows = exchange(places_m[order_m] % size, group, asked, given)
            return _Fetched.apply(self.own, rows, asked, given, self.groups)[order_m.argsort()]


class _Fetched(torch.autograd.Function):
    """Send ``rows`` of own features to the ranks that ask, and receive those of others: ``[k, M] -> [m, M]``."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, rows: torch.Tensor, asked: list[int], given: list[int], groups: SequenceGroups
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.asked, ctx.given, ctx.groups, ctx.shape = asked, given, groups, own.shape
        return exchange(own[rows], groups.sp_group, given, asked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        with name_missing_ranks(ctx.groups.roll_group):
            back = exchange(grad.contiguous(), ctx.groups.sp_group, ctx.asked, ctx.given)
        return grad.new_zeros(ctx.shape).index_add_(0, rows, back), None, None, None, None


class ImageFeatures(Deferred):
    """Features of images, ``[*lead, M]``, at the places ``index``, ``[*lead]``, in ``shares.whole``."""

    def __new__(cls, shares: Shares, index: torch.Tensor) -> "ImageFeatures":
        """Create a tensor without storage."""
        own = shares.own
        return super().__new__(cls, (*index.shape, own.shape[1]), own.dtype, own.device)

    def __init__(self, shares: Shares, index: torch.Tensor) -> None:
        self.shares, self.index = shares, index

    def make(self) -> torch.Tensor:
        """Gather the features of all images."""
        return self.shares.whole[self.index]

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run casts, ``cat`` along the first dim, and what keeps the last dim as it is."""
        name, more = func.__name__, args[1:]
        if name == "to" and not self.is_cast(more, kwargs):
            return self
        if name in ("detach", "to"):
            own = getattr(self.shares.own, name)(*more, **kwargs)
            return ImageFeatures(replace(self.shares, own=own), self.index.to(own.device))
        along_first = name == "cat" and (*more, *kwargs.values()) in ((), (0,))
        if along_first and all(getattr(each, "shares", None) is self.shares for each in args[0]):
            return ImageFeatures(self.shares, torch.cat([each.index for each in args[0]]))
        if name in _RESHAPES:
            shape = func(torch.empty(self.shape, device="meta"), *more, **kwargs).shape
            if shape[-1:] == self.shape[-1:]:
                return ImageFeatures(self.shares, self.index.reshape(shape[:-1]))
        return NotImplemented


class MergedEmbeddings(Deferred):
    """Embeddings ``[B, S, M]`` of a batch's ids, and of features that were put in the place of some.

    ``index`` is 0 for a token with the embedding of its id, else 1 + its row in the features, ``[B, S]``.
    """

    def __new__(cls, module: Any, ids: torch.Tensor, *_: Any) -> "MergedEmbeddings":
        """Create a tensor without storage."""
        # ZeRO 3 may keep the weight elsewhere.
        return super().__new__(cls, (*ids.shape, module.embedding_dim), module.weight.dtype, ids.device)

    def __init__(self, module: Any, ids: torch.Tensor, index: torch.Tensor, features: list[torch.Tensor]) -> None:
        self.module, self.ids, self.index, self.features = module, ids, index, features

    def make(self) -> torch.Tensor:
        """Embed all tokens on each rank, and gather the features of all images."""
        features = [each.whole() if isinstance(each, Deferred) else each for each in self.features]
        return self.of_tokens(self.ids, self.index, features)

    def of_tokens(self, ids: torch.Tensor, index: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        """Embed tokens, of a shard or all, and put features in the place of some; collective."""
        found, index = self.module._call_impl(ids).flatten(0, 1), index.flatten()
        ends = itertools.accumulate(map(len, self.features), initial=0)
        for (start, end), each in zip(itertools.pairwise(ends), features, strict=True):
            places = ((index > start) & (index <= end)).nonzero().flatten()
            found = found.index_copy(0, places, rows_of(each, index[places] - start - 1))
        return found.view(*ids.shape, -1)

    def run(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Run ``masked_scatter`` of whole tokens, and the checks of models before it."""
        name, mask, dim = func.__name__, args[1] if len(args) > 1 else None, self.shape[2]
        if name == "to" and not self.is_cast(args[1:], kwargs):
            return self
        if name not in ("masked_scatter", "__getitem__") or getattr(mask, "dtype", None) != torch.bool or kwargs:
            return NotImplemented
        if mask.dim() != 3 or mask.shape[:2] != self.ids.shape or (mask.shape[2] > 1 and mask.stride(2)):
            return NotImplemented
        mask_BS, count = mask[..., 0], int(mask[..., 0].sum())
        if name == "__getitem__":  # of which models ask the number of elements
            return torch.empty(count * dim, dtype=self.dtype, device="meta")
        features = as_made(args[2])
        if features.shape[-1] != dim or count * dim > features.numel() or features.dtype != self.dtype:
            return NotImplemented
        rows_BS = sum(map(len, self.features)) + mask_BS.flatten().cumsum(0).view(mask_BS.shape)
        index = torch.where(mask_BS, rows_BS, self.index)
        return MergedEmbeddings(self.module, self.ids, index, [*self.features, features.reshape(-1, dim)])


def as_made(x: Any) -> Any:
    """Return the whole tensor if it was made: its gradient is the same on all ranks."""
    return x.made if isinstance(x, Deferred) and x.made is not None else x


def rows_of(features: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return rows of features, ``[N, M] -> [m, M]``; collective if each rank has those of its own images."""
    rows = rows.to(features.device)
    return features.shares.fetch(features.index[rows]) if isinstance(features, ImageFeatures) else features[rows]


def defer_embeddings(spec: ModelSpec, calls: Any, patches: PatchSet) -> None:
    """Have a model's embeddings of a whole batch made where its language model is called, of a shard."""
    module = spec.embeddings

    def call(*args: Any, **kwargs: Any) -> Any:
        is_ids = len(args) == 1 and not kwargs and args[0].dim() == 2 and not args[0].is_floating_point()
        is_whole = calls.whole or calls.checking or calls.gathers_tokens or not torch.is_grad_enabled()
        if is_whole or not is_ids or not hasattr(module, "embedding_dim"):
            return module._call_impl(*args, **kwargs)
        return MergedEmbeddings(module, args[0], torch.zeros_like(args[0]), [])

    if isinstance(module, torch.nn.Module):
        patches.set(module, "_compiled_call_impl", call)  # what a module's __call__ runs, hooks included

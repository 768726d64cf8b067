"""Functions of torch that treat tokens one by one, and how each runs on a SequenceTensor's rows.

``apply`` returns NotImplemented for any other function, or for arguments that it does not know.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

from deepspeed_alst.whole_sequence.token_indexing import reshape, select, transpose
from deepspeed_alst.whole_sequence.token_rows import Row, run_on_rows

if TYPE_CHECKING:
    from deepspeed_alst.whole_sequence.sequence_tensor import SequenceTensor

SHAPE_QUERIES = {
    *("size", "dim", "numel", "nelement", "ndimension", "element_size", "is_floating_point", "is_complex", "__len__"),
    *("get_device", "is_contiguous", "stride"),
}
REFUSED = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
_RANDOM = {"bernoulli", "multinomial", "poisson", "binomial", "normal", "rand_like", "randn_like", "randint_like"}
_RANDOM |= {"rrelu", "gumbel_softmax", "scaled_dot_product_attention"}
# Functions that give a view, or may give the tensor itself.
_VIEWS = {
    *("getitem", "iter", "view", "reshape", "flatten", "view_as", "reshape_as", "unflatten", "transpose", "swapaxes"),
    *("permute", "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "detach"),
}
_CASTS = {"contiguous", "to", "float", "double", "half", "bfloat16", "long", "int", "bool"}
_ELEMENTWISE = {
    *("add", "radd", "sub", "subtract", "rsub", "mul", "rmul", "multiply", "div", "rdiv", "divide", "true_divide"),
    *("truediv", "rtruediv", "floordiv", "rpow"),
    *("pow", "neg", "negative", "positive", "abs", "absolute", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("sqrt", "rsqrt", "square", "reciprocal", "sigmoid", "tanh", "relu", "gelu", "silu", "softplus", "logsigmoid"),
    *("leaky_relu", "elu", "selu", "mish", "hardtanh", "relu6", "erf", "sin", "cos", "sign", "floor", "ceil", "round"),
    *("clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin", "where", "masked_fill", "lerp"),
    *("nan_to_num", "isnan", "isinf", "isfinite", "logaddexp", "logical_and", "logical_or", "logical_not", "logit"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "invert", "float", "double", "half", "bfloat16", "long"),
    *("int", "bool", "to", "detach", "clone", "contiguous", "zeros_like", "ones_like", "full_like", "addcmul"),
    *("addcdiv", "xlogy", "fmod", "remainder", "dropout", "alpha_dropout"),
}
# Functions of one dim or more: where their dim stands among the positional arguments, and what it is if left out.
_OF_DIM: dict[str, tuple[int, Any]] = {
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "logsumexp", "argmax", "argmin", "amax", "amin"), (1, None)),
    **dict.fromkeys(("max", "min", "sum", "mean", "prod", "any", "all", "cumsum", "cumprod", "var", "std"), (1, None)),
    **dict.fromkeys(("squeeze", "unsqueeze", "narrow", "select", "index_select"), (1, None)),
    **dict.fromkeys(("argsort", "sort", "glu"), (1, -1)),
    **dict.fromkeys(("norm", "topk", "kthvalue"), (2, -1)),
    **dict.fromkeys(("chunk", "split", "tensor_split"), (2, 0)),
    **dict.fromkeys(("normalize", "cosine_similarity"), (2, 1)),
    "unbind": (1, 0),
    "gather": (1, None),
    "take_along_dim": (2, None),
}
_DEFAULT_MISSING = {"norm", "max", "min"}  # without a dim they reduce all
# Of these, what they do to dims of tokens is done to the places of the tokens.
_REARRANGES = {"squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select"}
# Losses of each element or row, by their reduction "none".
_LOSSES = {
    *("cross_entropy", "nll_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss"),
    *("binary_cross_entropy", "binary_cross_entropy_with_logits"),
}
_AUGMENTED = {f"__i{name}__": f"__{name}__" for name in ("add", "sub", "mul", "truediv", "pow")}
_OVER_ROWS = {"linear", "matmul", "layer_norm", "rms_norm", "mv"}


def draws(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Return True if a function draws random numbers: a dropout may be off."""
    if "dropout" not in name:
        return name in _RANDOM
    rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    return bool(rate) and bool(kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True)))


def is_in_place(name: str) -> bool:
    """Return True for torch's names of in-place ops."""
    return name in _AUGMENTED or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def apply(x: "SequenceTensor", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a function of tokens on the rows of ``x``, the first SequenceTensor of its arguments.

    Returns:
        A SequenceTensor, or a plain tensor gathered from all ranks; NotImplemented if the function is not known.
    """
    name = func.__name__
    if is_in_place(name):
        plain = getattr(torch.Tensor, _AUGMENTED.get(name) or name.rstrip("_"), None)
        if name == "__setitem__" or plain is None or args[0] is not x or x.is_shared:
            return NotImplemented
        found = _run(x, plain, args, kwargs)
        same = isinstance(found, type(x)) and found.places is x.places and found.dtype == x.dtype
        return x.replace(found) if same and found.shape == x.shape else NotImplemented
    found = _run(x, func, args, kwargs)
    is_view = name.strip("_") in _VIEWS or (name in _CASTS and getattr(found, "dtype", None) == x.dtype)
    if is_view and found is not NotImplemented:
        x.is_shared = True
        found = tree_map(_as_view, list(found) if name == "__iter__" else found)
        return iter(found) if name == "__iter__" else found
    return found


def _as_view(x: torch.Tensor) -> torch.Tensor:
    """Mark what stands for a view of another tensor, so that no in-place op changes it alone."""
    if hasattr(x, "is_shared"):
        x.is_shared = True
        return x
    return x[None].unbind()[0] if x.requires_grad else x  # autograd lets no view of several be changed in place


def _run(x: "SequenceTensor", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    bare = func.__name__.strip("_")
    if "out" in kwargs or kwargs.get("inplace") or (bare == "where" and len(args) + len(kwargs) < 3):
        return NotImplemented
    if bare in _ELEMENTWISE:
        return _elementwise(x, func, args, kwargs)
    if bare in _LOSSES:
        return _loss(x, func, args, kwargs)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
    if not args:
        return NotImplemented
    if bare == "getitem":
        return select(x, args[1])
    if bare == "iter":
        return _of_dim(x, torch.Tensor.unbind, "unbind", args, {})
    if bare in ("view", "reshape", "flatten", "view_as", "reshape_as", "unflatten"):
        return reshape(x, func, args, kwargs)
    if bare in ("transpose", "swapaxes", "permute"):
        return transpose(x, func, args, kwargs)
    if bare in _OF_DIM:
        return _of_dim(x, func, bare, args, kwargs)
    return _over_rows(x, func, args, kwargs) if bare in _OVER_ROWS else NotImplemented


def _elementwise(x: "SequenceTensor", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if any(each is True for each in args[1:]) and func.__module__ == "torch.nn.functional":
        return NotImplemented  # of relu(x, True): in place
    arguments = x.rows_and((args, kwargs))
    if arguments is NotImplemented:
        return NotImplemented
    grad = func.__name__ != "detach"
    return x.like(run_on_rows(lambda args, kwargs: func(*args, **kwargs), *arguments, grad=grad))


def _of_dim(x: "SequenceTensor", func: Callable[..., Any], name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    place, default = _OF_DIM[name]
    key = next((each for each in ("dim", "dims", "axis") if each in kwargs), "dim")
    if key in kwargs:
        dim, rest = kwargs[key], {each: value for each, value in kwargs.items() if each != key}
    elif len(args) > place and not isinstance(args[place], torch.Tensor | torch.dtype):
        dim, args, rest = args[place], (*args[:place], *args[place + 1 :]), kwargs
    else:
        dim, rest = None if name in _DEFAULT_MISSING else default, kwargs
    if args[0] is not x or isinstance(dim, bool):
        return NotImplemented
    if name in ("sum", "mean") and (dim is None or _touches_lead(x, dim)):
        return _reduce(x, name, dim, rest, args[1:])
    if dim is None or isinstance(dim, str) or (isinstance(dim, tuple | list) and not dim):
        return NotImplemented
    total, lead = x.dim() + (name == "unsqueeze"), x.num_lead
    dims = [each % total for each in (dim if isinstance(dim, tuple | list) else [dim])]
    if all(each >= lead for each in dims):
        if name in ("gather", "take_along_dim") and not _has_index_of_tokens(x, name, (args[1:], rest), dims[0]):
            return NotImplemented
        inner: Any = [each - total for each in dims]
        inner = inner if isinstance(dim, tuple | list) else inner[0]
        arguments = x.rows_and((args, rest))
        if arguments is NotImplemented:
            return NotImplemented
        call = _with_dim(func, place, inner, key if key in kwargs else "dim")
        return x.like(run_on_rows(call, *arguments))
    if all(each < lead for each in dims) and name in _REARRANGES and not isinstance(dim, tuple | list):
        call = _with_dim(func, place, dims[0], key if key in kwargs else "dim")
        return x.at(lambda index: call((index, *args[1:]), rest))
    return NotImplemented


def _has_index_of_tokens(x: "SequenceTensor", name: str, arguments: Any, dim: int) -> bool:
    """Return True if an index has all tokens of ``x``, and nothing of it would be broadcast."""
    index = next((each for each in tree_iter(arguments) if isinstance(each, torch.Tensor)), None)
    equal = range(x.num_lead) if name == "gather" else [each for each in range(x.dim()) if each != dim]
    return index is not None and index.dim() == x.dim() and all(index.shape[each] == x.shape[each] for each in equal)


def _with_dim(func: Callable[..., Any], place: int, dim: Any, key: str) -> Callable[..., Any]:
    """Return a call of a function with its dim where it was left out."""

    def call(args: Any, kwargs: dict[str, Any]) -> Any:
        if len(args) > place:
            return func(*args[:place], dim, *args[place:], **kwargs)
        return func(*args, **{**kwargs, key: dim})

    return call


def _touches_lead(x: "SequenceTensor", dim: Any) -> bool:
    return any(each % x.dim() < x.num_lead for each in (dim if isinstance(dim, tuple | list) else [dim]))


def _reduce(x: "SequenceTensor", name: str, dim: Any, kwargs: dict[str, Any], positional: Any) -> Any:
    """Sum over dims of tokens: over this rank's rows, then over the ranks."""
    keepdim = bool(kwargs.get("keepdim", positional[0] if positional else False))
    if (
        (name == "mean" and not x.is_floating_point())
        or set(kwargs) - {"keepdim", "dtype"}
        or len(positional) > 1
        or x.places.of_rows is None
    ):
        return NotImplemented
    dtype = kwargs.get("dtype") or (x.dtype if x.is_floating_point() else torch.int64)
    x = x.to(torch.float32 if dtype.itemsize == 2 else dtype)
    total, lead = x.dim(), x.num_lead
    dims = range(total) if dim is None else [each % total for each in (dim if isinstance(dim, tuple | list) else [dim])]
    count = torch.Size([x.shape[each] for each in dims]).numel()
    trailing, over = [each - total for each in dims if each >= lead], [each for each in dims if each < lead]
    if trailing:
        x = type(x)(run_on_rows(lambda rows: rows.sum(trailing, keepdim=True), Row(x.rows)), x.places)
    kept = [1 if each in over else x.shape[each] for each in range(lead)]
    ids = torch.arange(torch.Size(kept).numel(), device=x.device).view(kept).expand(x.shape[:lead])
    found = x.sum_to(ids, torch.Size(kept).numel()).reshape(*kept, *x.shape[lead:])
    found = (found / count if name == "mean" else found).to(dtype)
    return found if keepdim else found.reshape([size for each, size in enumerate(found.shape) if each not in dims])


def _over_rows(x: "SequenceTensor", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a product with weights, or a norm of the last dims."""
    others = [each for each in tree_iter((args[1:], kwargs)) if isinstance(each, torch.Tensor)]
    if args[0] is not x or any(each.dim() > 2 or isinstance(each, type(x)) for each in others) or x.dim() == x.num_lead:
        return NotImplemented
    shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    if "norm" in func.__name__ and len(shape if isinstance(shape, tuple | list) else [shape]) > x.dim() - x.num_lead:
        return NotImplemented
    rest, options = tree_map_only(torch.Tensor, x.places.tokens.replicated, (args[1:], kwargs))
    return x.like(run_on_rows(lambda rows: func(rows, *rest, **options), Row(x.rows)))


def _loss(x: "SequenceTensor", func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run a loss of torch's element by element or row by row, and reduce its numbers."""
    bound = inspect.signature(getattr(F, func.__name__)).bind(*args, **kwargs)
    bound.apply_defaults()
    given, name = bound.arguments, func.__name__
    if given.get("size_average") is not None or given.get("reduce") is not None or given.get("weight") is not None:
        return NotImplemented
    weights = given.get("pos_weight")
    if not isinstance(given["reduction"], str) or (weights is not None and weights.dim() > x.dim() - x.num_lead):
        return NotImplemented
    reduction, by_row = given["reduction"], name in ("cross_entropy", "nll_loss")
    input_, target = given["input"], given["target"]
    if by_row and (input_ is not x or x.num_lead != 1 or x.dim() != 2):
        return NotImplemented
    is_classes = by_row and isinstance(target, torch.Tensor) and target.dim() == 1
    if is_classes and (type(target) is type(x) or target.shape != x.shape[:1]):
        return NotImplemented
    targets = x.places.rows_of(target.to(x.device)) if is_classes else x.operand(target)
    if targets is None:
        return NotImplemented
    targets = Row(targets) if is_classes else targets
    inputs = x.operand(input_)
    if inputs is None:
        return NotImplemented
    options = {each: value for each, value in given.items() if each not in ("input", "target", "reduction")}

    def each(input_: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return func(input_, target, reduction="none", **options)

    numbers = x.like(run_on_rows(each, inputs, targets))
    if reduction == "none":
        return numbers
    total = numbers.sum()
    if reduction == "sum":
        return total
    if reduction == "batchmean":
        return total / input_.shape[0]
    count = (target != given["ignore_index"]).sum() if is_classes else numbers.numel()
    return total / count

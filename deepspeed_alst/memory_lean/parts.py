"""Run a decoder layer's own forward on a tile of tokens up to its attention call, or on from there.

The attention function, registered under a name private to the model, stops the forward and takes q, k and v
(``front``), or answers with an output (``tail``). So no code is written per family, and no weight is sliced.

Legend: B batch, t tokens of a tile, M hidden size, H query heads, K KV heads, D head dim of q and k, E of v.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from deepspeed_alst.attention.hf_attention import IN_THE_MASK, AttentionBackend
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.memory_lean.chunks import UnsupportedLayerError
from deepspeed_alst.memory_lean.hf_records import Record, of_tile, recording
from deepspeed_alst.tiling.gated_mlp import GatedMlp
from deepspeed_alst.tiling.tiled_mlp import is_value_unused
from deepspeed_alst.tiling.tiled_module import TiledModule
from deepspeed_alst.tiling.weight_gradients import WeightGradients, refuse_foreign_weights

# Arguments of an attention call that chunks act on, or that only tune another kernel.
_KNOWN_ARGUMENTS = (*IN_THE_MASK, "s_aux", "softcap", "dropout", "kernel_options")


class AttentionCall(NamedTuple):
    """Arguments of a layer's attention call: q ``[B, H, t, D]``, k ``[B, K, t, D]``, v ``[B, K, t, E]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: MaskSpec | None
    scaling: float | None
    arguments: dict[str, Any]
    """Others that change the result: ``AttentionBackend.forwarded_kwargs``."""
    backend: AttentionBackend


class _Reached(BaseException):
    """Stops a forward at its attention call; nothing but ``front`` catches it."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__()
        self.call = call


class LayerParts:
    """Front and tail of one layer.

    Args:
        layer: the decoder layer.
        forward: its own forward, without a checkpoint.
        calls: state of the model's forwards, through which the attention function is answered.
        modules: token-wise modules in the layer; a gated MLP runs in closed form.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        forward: Callable[..., Any],
        calls: ForwardContext,
        modules: Iterable[TiledModule],
    ) -> None:
        self._layer, self._forward, self._calls, self._modules = layer, forward, calls, list(modules)
        self._only_q: list[torch.nn.Linear] = []
        self._only_kv: list[torch.nn.Linear] = []
        self._unused_in_tail: list[torch.nn.Linear] = []
        self._unused_values: set[TiledModule] = set()
        self.returns_tuple = False  # of the output alone
        self._nodes: dict[TiledModule, Any] | None = None  # of the closed forms, while they are learnt

    def front(self, x_BtM: torch.Tensor, kwargs: dict[str, Any], need: str = "qkv") -> AttentionCall:
        """Return the layer's attention call; with ``need`` "q" or "kv", the other tensors are NaN.

        Raises:
            UnsupportedLayerError: the layer does not call attention.
        """
        skipped = {"q": self._only_kv, "kv": self._only_q}.get(need, [])
        with self._answering(_stop), _skipping(skipped), recording(()):
            try:
                self._forward(x_BtM, **kwargs)
            except _Reached as reached:
                return _as_autocast(reached.call)
        raise UnsupportedLayerError(f"{type(self._layer).__name__} does not call transformers' attention interface")

    def tail(
        self,
        x_BtM: torch.Tensor,
        o_BtHE: torch.Tensor,
        kwargs: dict[str, Any],
        sums: WeightGradients | None = None,
        keys: Iterable[str] = (),
    ) -> tuple[torch.Tensor, list[Record]]:
        """Return the layer's output ``[B, t, M]`` from its input and attention's output, and its records of ``keys``.

        With ``sums``, gradients of gated MLPs' weights are added to them in the backward.
        """
        answered = False

        def answer(*call: Any) -> torch.Tensor:
            nonlocal answered
            if answered:
                raise UnsupportedLayerError(f"{type(self._layer).__name__} calls attention more than once")
            answered = True
            return o_BtHE

        with (
            self._answering(answer),
            _skipping(self._unused_in_tail),
            self._closed_forms(sums),
            recording(keys) as found,
        ):
            y = self._forward(x_BtM, **kwargs)
        self.returns_tuple = isinstance(y, tuple) and len(y) == 1
        y = y[0] if self.returns_tuple else y
        if not isinstance(y, torch.Tensor) or y.shape != x_BtM.shape:
            raise UnsupportedLayerError(f"{type(self._layer).__name__} returns more than its hidden states")
        return y, of_tile(found, *x_BtM.shape[:2])

    def learn(self, x_BtM: torch.Tensor, kwargs: dict[str, Any]) -> AttentionCall:
        """Find what each part needs, from a few tokens' graphs; return their attention call.

        Raises:
            UnsupportedLayerError: the layer cannot be split into a front and a tail.
        """
        self._only_q, self._only_kv, self._unused_in_tail, self._unused_values = [], [], [], set()
        made: list[tuple[torch.nn.Linear, torch.Tensor]] = []
        own = list(self._layer.parameters())
        with torch.enable_grad(), PatchSet() as patches:
            for module in self._layer.modules():
                if type(module) is torch.nn.Linear:
                    patches.hook(module, "forward", lambda module, args, output: made.append((module, output)))
            x = x_BtM.detach().requires_grad_()
            call = self.front(x, kwargs)
            q, k, v = (_reached_by(each, made) for each in (call.q, call.k, call.v))
            fronts = q | k | v
            made.clear()
            o = call.q.new_ones(*call.q.shape[:1], call.q.shape[2], call.q.shape[1], call.v.shape[3]).requires_grad_()
            y, _ = self.tail(x, o, kwargs)
            in_tail = _reached_by(y, [each for each in made if each[0] in fronts])
        kept = [
            f"{type(module).__name__}.{name}"
            for module in self._layer.modules()
            for name, value in vars(module).items()
            if isinstance(value, torch.Tensor) and value.grad_fn is not None
        ]
        if kept:
            raise UnsupportedLayerError(f"{kept[0]} keeps a tensor with a graph, which would be a tile's")
        try:
            refuse_foreign_weights([call.q, call.k, call.v, y], (x, o, *own), type(self._layer).__name__)
        except UnsupportedModelError as error:
            raise UnsupportedLayerError(str(error)) from error
        self._only_q, self._only_kv, self._unused_in_tail = list(q - k - v), list((k | v) - q), list(fronts - in_tail)
        self._nodes = nodes = {}
        with torch.enable_grad():
            y, _ = self.tail(x, o, kwargs, WeightGradients([], 1, True))
        self._nodes = None
        self._unused_values = {work for work, node in nodes.items() if is_value_unused([y.grad_fn], node)}
        return call

    @contextlib.contextmanager
    def _answering(self, answer: Callable[..., torch.Tensor]) -> Iterator[None]:
        before, self._calls.answer_attention = self._calls.answer_attention, answer
        try:
            yield
        finally:
            self._calls.answer_attention = before

    @contextlib.contextmanager
    def _closed_forms(self, sums: WeightGradients | None) -> Iterator[None]:
        """Run gated MLPs in closed form, any other module as it is."""
        with PatchSet() as patches:
            for work in self._modules:
                run = functools.partial(self._run_module, work, work.module.forward, sums)
                patches.set(work.module, "forward", run)
            yield

    def _run_module(
        self, work: TiledModule, forward: Callable[..., Any], sums: WeightGradients | None, *args: Any, **kwargs: Any
    ) -> Any:
        rows = [*args, *kwargs.values()]
        form = work.closed_form(rows, rows[0].dim()) if rows and isinstance(rows[0], torch.Tensor) else None
        if form is None or sums is None:
            # A chunk's tile needs no tiles in it, whose backward would run the module once more.
            is_tiled = getattr(forward, "__wrapped__", None) == work.forward
            return (work.forward if is_tiled else forward)(*args, **kwargs)
        y = _ClosedForm.apply(rows[0], form, sums, work in self._unused_values)
        if self._nodes is not None:
            self._nodes[work] = y.grad_fn
        return y


class _ClosedForm(torch.autograd.Function):
    """Gated MLP whose backward adds its weight gradients to the sums of all tiles; NaN where its value is unused."""

    @staticmethod
    def forward(
        ctx: Any, x_BtM: torch.Tensor, form: GatedMlp, sums: WeightGradients, value_unused: bool
    ) -> torch.Tensor:
        ctx.form, ctx.sums = form, sums
        ctx.save_for_backward(x_BtM)
        shape = (*x_BtM.shape[:-1], form.down.out_features)
        if value_unused:
            return x_BtM.new_full(shape, torch.nan)  # no view: Llama 4 adds to it in place
        y_BtM = x_BtM.new_empty(shape)
        form.forward(x_BtM.flatten(0, -2), y_BtM.flatten(0, -2))
        return y_BtM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BtM: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (x_BtM,) = ctx.saved_tensors
        dx_BtM = torch.empty_like(x_BtM, memory_format=torch.contiguous_format)
        ctx.form.backward(x_BtM.flatten(0, -2), dy_BtM.flatten(0, -2).contiguous(), ctx.sums, dx_BtM.flatten(0, -2))
        return dx_BtM, None, None, None


def _as_autocast(call: AttentionCall) -> AttentionCall:
    """Cast q, k and v as autocast does for torch's attention."""
    kind = call.q.device.type
    if not torch.is_autocast_enabled(kind):
        return call
    dtype = torch.get_autocast_dtype(kind)
    return call._replace(q=call.q.to(dtype), k=call.k.to(dtype), v=call.v.to(dtype))


def _stop(*call: Any) -> torch.Tensor:
    raise _Reached(AttentionCall(*call))


@contextlib.contextmanager
def _skipping(linears: Iterable[torch.nn.Linear]) -> Iterator[None]:
    """Make Linears whose output is unused return an expanded NaN, without compute or memory."""
    with PatchSet() as patches:
        for linear in linears:
            patches.set(linear, "forward", functools.partial(_nothing, linear.out_features))
        yield


def _nothing(features: int, x: torch.Tensor) -> torch.Tensor:
    return _nan(x, (*x.shape[:-1], features))


def _nan(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return NaNs with the memory of one token, whose elements are adjacent as ``view_as_complex`` needs them."""
    return x.new_full(shape[-1:], torch.nan).expand(shape)


def _reached_by(end: torch.Tensor, made: Iterable[tuple[torch.nn.Linear, torch.Tensor]]) -> set[torch.nn.Linear]:
    """Return the Linears of whose outputs ``end`` is made."""
    made = [(linear, output) for linear, output in made if output.requires_grad]
    if not made or not end.requires_grad:
        return set()
    weights = torch.cos(torch.arange(end.numel(), device=end.device)).view(end.shape).to(end.dtype)
    grads = torch.autograd.grad(end, [output for _, output in made], weights, allow_unused=True, retain_graph=True)
    # A fused op of q and k links each to both in the graph; its gradient is exactly 0 for one of them.
    return {linear for (linear, _), grad in zip(made, grads, strict=True) if grad is not None and _is_nonzero(grad)}


def _is_nonzero(x: torch.Tensor) -> bool:
    return type(x).__name__ == "FakeTensor" or bool(x.any())


def with_mask(call: AttentionCall, calls: ForwardContext) -> AttentionCall:
    """Return an attention call whose window and documents are all in its mask.

    Raises:
        UnsupportedLayerError: there is no kernel for it.
    """
    backend, arguments, mask = call.backend, dict(call.arguments), call.mask
    if isinstance(mask, torch.Tensor):
        raise UnsupportedLayerError(f"a mask of shape {list(mask.shape)}")
    if not backend.uses_mask:
        documents = calls.documents if "cu_seq_lens_q" in arguments else ()
        mask = MaskSpec(arguments.get("sliding_window"), None, documents)
    arguments = {name: value for name, value in arguments.items() if name not in _KNOWN_ARGUMENTS}
    if arguments or backend.is_programs_own:
        with_what = f" with {' and '.join(arguments)}" if arguments else ""
        raise UnsupportedLayerError(f"no kernel for attn_implementation='{backend.name}'{with_what}")
    return call._replace(mask=mask)

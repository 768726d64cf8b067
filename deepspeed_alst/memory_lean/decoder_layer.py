"""Run a decoder layer in chunks of tokens, or its ordinary forward if it cannot be chunked."""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from deepspeed_alst.attention.attention_kernels import Dropout, kernel_for
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.config.schema import MemoryLeanConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.selfcheck import agrees, without_zero_weights
from deepspeed_alst.errors import SetupError
from deepspeed_alst.memory_lean.chunks import OnDevice, Saved, Sizes, UnsupportedLayerError, cut
from deepspeed_alst.memory_lean.exchange import HeadExchange
from deepspeed_alst.memory_lean.hf_records import HOOKS, append_records, wanted_records
from deepspeed_alst.memory_lean.layer import LeanCall
from deepspeed_alst.memory_lean.lean_pass import LeanPass
from deepspeed_alst.memory_lean.parts import AttentionCall, LayerParts, with_mask
from deepspeed_alst.memory_lean.stream import ResidualStream
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy
from deepspeed_alst.random_draws.draw_mode import branch, current_draws, not_counted
from deepspeed_alst.random_draws.model_draws import random_states
from deepspeed_alst.tiling.gated_mlp import has_user_hook
from deepspeed_alst.tiling.tiled_module import TiledModule, current_autocast, dropout_rates

Vote = Callable[[bool], bool]
"""Returns True if a condition holds on any rank that votes."""

_LEARNED_FROM = 8  # tokens
_TESTED = 512  # tokens, of which one half must not change the other's results


def sizes_of(config: MemoryLeanConfig) -> Sizes:
    """Return the sizes of a pass."""
    return Sizes(config.chunk_tokens, config.tile_tokens, config.key_block)


def new_group(policy: CheckpointPolicy | None, layer: torch.nn.Module | None) -> Callable[[torch.Tensor], Saved]:
    """Return a function that saves a tensor of one chunk, where the layer's are kept."""
    put: Callable[[torch.Tensor], Saved] = OnDevice
    if policy is not None and policy.store is not None:
        put = policy.store.group(layer is not None and policy.stays(layer), prefetches=False).put
    return lambda x: put(x.clone())  # not a view of the input, whose memory the output may take


class LeanLayer:
    """One layer's forward in chunks; ``forward`` replaces the layer's."""

    def __init__(
        self,
        layer: torch.nn.Module,
        config: MemoryLeanConfig,
        group: Any,
        calls: ForwardContext,
        modules: list[TiledModule],
        policy: CheckpointPolicy | None,
        stream: ResidualStream,
        votes: tuple[Vote, Vote],
        router_classes: tuple[type, ...],
        kv_groups: Mapping[int, Any],
    ) -> None:
        self._layer, self._calls, self._config, self._policy = layer, calls, config, policy
        self._stream, (self._on_any_shard, self._on_any_rank) = stream, votes
        stream.watch(layer)
        self._kv_groups = kv_groups
        self._group, self._sp_size = group, 1 if group is None else dist.get_world_size(group)
        self._is_mixture = any(isinstance(each, router_classes) for each in layer.modules())
        self._ordinary: Callable[..., Any] = layer.forward
        self._names = list(inspect.signature(type(layer).forward).parameters)[1:]  # after self
        self._parts = LayerParts(layer, self._own_forward, calls, modules)
        self._learned: tuple[Any, ...] = ()
        self._uncut, self._tested = "", set[bool]()
        self._has_hooks: bool | None = None

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer in chunks where it is checkpointed or has no graph; else as it is."""
        if self._calls.answer_attention is not None:
            return self._ordinary(*args, **kwargs)
        if self._calls.whole or (torch.is_grad_enabled() and not self._layer.training):
            return self._run_ordinary(*args, **kwargs)
        named = dict(zip(self._names, args, strict=False)) | kwargs
        x_BsM = named.pop(self._names[0])
        has_graph = torch.is_grad_enabled()
        taken = self._stream.take(self._layer, x_BsM, named) if has_graph else []
        call = self._call(x_BsM, named, bool(taken)) if self._calls.in_chunks else None
        # Each sequence has its own length, and ranks without SP may evaluate alone. ZeRO reduces gradients in the order
        # of their arrival, which chunks change: all ranks run the layer alike.
        if has_graph and self._on_any_rank(call is None):
            call = None
        if call is None:
            return self._run_ordinary(*args, **kwargs)
        y_BsM, *records = LeanPass.apply(call, x_BsM, *call.weights) if has_graph else call.forward(x_BsM, False)
        append_records(zip((key for key, _ in call.records), records, strict=True))
        self._stream.replace(self._layer, taken, y_BsM)
        return (y_BsM,) if self._parts.returns_tuple else y_BsM

    def _call(self, x_BsM: torch.Tensor, named: dict[str, Any], in_place: bool) -> LeanCall | None:
        """Describe a call of the layer; warn and return None if it has to run on the ordinary path."""
        try:
            with _disable_current_modes() if self._calls.checking else contextlib.nullcontext():
                return self._prepare(x_BsM, named, in_place)
        except UnsupportedLayerError as error:
            layer = type(self._layer).__name__
            warnings.warn(f"alst.memory_lean_layer: {layer} runs on the ordinary path: {error}", stacklevel=2)
            return None

    def _run_ordinary(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer as it is, with as many branches of draws as in chunks."""
        is_checkpointed = self._layer.gradient_checkpointing and self._layer.training and torch.is_grad_enabled()
        with contextlib.nullcontext() if is_checkpointed else branch()():  # a checkpoint starts one itself
            return self._ordinary(*args, **kwargs)

    def _own_forward(self, x_BtM: torch.Tensor, **kwargs: Any) -> Any:
        """Run the layer's forward without the checkpoint around it."""
        with PatchSet() as patches:
            # The wrapper of transformers checkpoints only with gradients and this flag.
            patches.set(self._layer, "gradient_checkpointing", False)
            return self._ordinary(x_BtM, **kwargs)

    def _check_hooks(self) -> None:
        """Raise UnsupportedLayerError if the program has a hook inside the layer, on any rank: ranks exchange alike.

        Raises:
            SetupError: it has registered one after the layer's first forward.
        """
        has_hooks = has_user_hook(*itertools.islice(self._layer.modules(), 1, None), but=HOOKS)
        if self._has_hooks is None:
            self._has_hooks = self._on_any_shard(has_hooks)
        if has_hooks and not self._has_hooks:
            raise SetupError(
                f"alst.memory_lean_layer: a hook was registered inside {type(self._layer).__name__} after its first "
                "forward. Register it before, or set the key to false"
            )
        if self._has_hooks:
            raise UnsupportedLayerError("a hook of the program inside the layer")

    def _cannot_be_cut(self, x_BsM: torch.Tensor, kwargs: dict[str, Any]) -> str:
        """Return why q, k, v, or the output for one attention output, depend on other tokens; empty if they do not."""
        s = x_BsM.shape[1]

        def run(x_BnM: torch.Tensor, first: int) -> list[torch.Tensor]:
            named = {name: cut(value, slice(first, first + x_BnM.shape[1]), s) for name, value in kwargs.items()}
            q, k, v, *_ = self._parts.front(x_BnM, named)
            y_BnM, _ = self._parts.tail(x_BnM, q.new_ones(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), named)
            return [*(x.transpose(1, 2) for x in (q, k, v)), y_BnM]

        # Rows of a product of the same shape are equal to the bit; those of experts may be grouped otherwise.
        are_equal, n, found = agrees if self._is_mixture else torch.equal, min(s, _TESTED), list[bool]()
        with PatchSet() as patches, torch.no_grad(), without_zero_weights(self._layer):
            for module in self._layer.modules():
                patches.set(module, "training", False)  # no dropout
            x_BnM = x_BsM[:, :n].clone()
            expected = run(x_BnM, 0)
            for changed, kept in ((slice(n // 2), slice(n // 2, n)), (slice(n // 2, n), slice(n // 2))):
                other_BnM = x_BnM.clone()
                other_BnM[:, changed] = 3 * x_BnM[:, changed].flip(-1)
                found += [are_equal(x[:, kept], y[:, kept]) for x, y in zip(run(other_BnM, 0), expected, strict=True)]
            # Rounding may route a token to another expert, which changes its output.
            pairs = list(zip(run(x_BnM[:, n // 2 :], n // 2), expected, strict=True))[: 3 if self._is_mixture else 4]
            same_place = all(agrees(x, y[:, n // 2 :]) for x, y in pairs)
        reasons = {"mixes tokens": not all(found), "depends on a token's place or the length": not same_place}
        return next((why for why, holds in reasons.items() if self._on_any_shard(holds)), "")

    def _learn(self, x_BtM: torch.Tensor, kwargs: dict[str, Any], draws_anew: bool) -> None:
        device = x_BtM.device
        devices = [] if device.type == "cpu" else [device]
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            before = random_states(self._layer)
            self._parts.learn(x_BtM, kwargs)
            if draws_anew and not all(map(torch.equal, before, random_states(self._layer))):
                raise UnsupportedLayerError("random numbers at sequence_parallel_size 1, which chunks cannot repeat")

    def _attention_call(self, x_BsM: torch.Tensor, kwargs: dict[str, Any], draws_anew: bool) -> AttentionCall:
        """Return the attention call of a few tokens, from which the layer is learnt first.

        Raises:
            UnsupportedLayerError: the layer cannot be cut.
        """
        s = x_BsM.shape[1]
        few = slice(0, min(s, _LEARNED_FROM))
        state = (self._layer.training, torch.is_autocast_enabled(x_BsM.device.type))
        # A copy: what saves the few tokens, such as a graph, holds the whole input with a view.
        x_BfM, of_few = x_BsM[:, few].clone(), {name: cut(value, few, s) for name, value in kwargs.items()}
        with not_counted():
            # The model check's forwards are short. Fake tensors (ds_alst plan) have no values to compare.
            if self._calls.checking not in self._tested and type(x_BsM).__name__ != "FakeTensor":
                self._uncut = self._uncut or self._cannot_be_cut(x_BsM, kwargs)
                self._tested.add(self._calls.checking)
            if self._uncut:
                raise UnsupportedLayerError(f"{type(self._layer).__name__} {self._uncut} outside of its attention")
            if self._learned != state:
                self._learn(x_BfM, of_few, draws_anew)
                self._learned = state
            with torch.no_grad():
                attention = with_mask(self._parts.front(x_BfM, of_few), self._calls)
        sinks = attention.arguments.get("s_aux")
        if sinks is not None and all(sinks is not param for param in self._layer.parameters()):
            raise UnsupportedLayerError("sinks that are no weight of the layer")
        return attention

    def _sizes(self, s: int) -> Sizes:
        """Return the sizes for a shard of s tokens."""
        sizes = sizes_of(self._config)
        if self._calls.checking:  # a few tokens, which are to make several chunks and tiles
            sizes = Sizes(-(-s // 2), -(-s // 3), s)
        if self._is_mixture:
            # A tile's gradient of stacked experts is as large as the experts. The model check replays their choices,
            # which it knows for whole shards.
            sizes = Sizes(s, s, s) if self._calls.checking else sizes._replace(tile_tokens=sizes.chunk_tokens)
        return sizes

    def _prepare(self, x_BsM: torch.Tensor, kwargs: dict[str, Any], in_place: bool) -> LeanCall:
        """Describe a call of the layer.

        Raises:
            UnsupportedLayerError: it has to run on the ordinary path.
        """
        if x_BsM.dim() != 3:
            raise UnsupportedLayerError(f"an input of shape {list(x_BsM.shape)}")
        B, s, _ = x_BsM.shape
        if torch.is_grad_enabled() and not self._layer.gradient_checkpointing:
            raise UnsupportedLayerError("gradient checkpointing was turned off")
        if any(kwargs.get(name) is not None for name in ("past_key_values", "cache", "layer_past")):
            raise UnsupportedLayerError("a cache")
        if any(isinstance(each, torch.Tensor) and each.requires_grad for each in tree_leaves(kwargs)):
            raise UnsupportedLayerError("an argument that needs a gradient")
        self._check_hooks()
        draws_anew = self._layer.training and not self._calls.draws.are_counted
        if draws_anew and any(dropout_rates(self._layer).values()):
            raise UnsupportedLayerError("dropout at sequence_parallel_size 1, whose draws chunks cannot repeat")
        attention = self._attention_call(x_BsM, kwargs, draws_anew)
        plan = HeadPlan(self._sp_size, attention.q.shape[1], attention.k.shape[1])
        kv_group = self._kv_groups.get(plan.kv_sharers)
        plan = dataclasses.replace(plan, divides_kv=kv_group is not None)
        rate, draws, dropout = attention.arguments.get("dropout"), current_draws(), None
        if rate and draws is None:
            raise UnsupportedLayerError("attention with dropout, whose draws chunks cannot repeat")
        exchange, drawing = HeadExchange(plan, self._group, kv_group), branch()
        if rate and draws is not None:
            with drawing():
                dropout = Dropout(rate, draws.attention_key(), plan.heads_of(exchange.rank))
        return LeanCall(
            parts=self._parts,
            exchange=exchange,
            sizes=self._sizes(s),
            kwargs=kwargs,
            attention=attention,
            kernel=kernel_for(attention.q, attention.scaling, attention.arguments.get("softcap"), dropout),
            shape=(B, s),
            in_place=in_place,
            drawing=drawing,
            autocast=current_autocast(x_BsM.device.type),
            new_group=functools.partial(new_group, self._policy, self._layer),
            saves_output=self._policy is not None and self._policy.saves_attention(self._layer),
            keys=wanted_records(),
            weights=[param for param in self._layer.parameters() if param.requires_grad],
        )

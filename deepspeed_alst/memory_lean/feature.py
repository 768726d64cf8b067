"""``alst.memory_lean_layer``."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.attention.head_plan import HeadPlan, attention_heads
from deepspeed_alst.attention.hf_one_rank import register_on_one_rank
from deepspeed_alst.config.schema import AutoMemoryLeanConfig, MemoryLeanConfig
from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import any_rank
from deepspeed_alst.distributed.mesh import build_adjacent, destroy_groups
from deepspeed_alst.kernels import define_ops
from deepspeed_alst.memory_lean.chunks import references_of_a_gradient
from deepspeed_alst.memory_lean.decoder_layer import LeanLayer, Vote, new_group, sizes_of
from deepspeed_alst.memory_lean.norm import ChunkedNorm
from deepspeed_alst.memory_lean.stream import ResidualStream
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy, Chunks, turn_on_checkpointing
from deepspeed_alst.offload.feature import ActivationOffload
from deepspeed_alst.random_draws.model_draws import is_dropout
from deepspeed_alst.tiling.tiled_module import TiledModule
from deepspeed_alst.tiling.token_wise import token_wise_modules

_GIB = 2**30
_MAX_SUM_BYTES = 16 * _GIB  # a fifth of an 80 GB GPU; DeepSeek-V3's experts need 46


class MemoryLeanLayers(Feature):
    """Decoder layers that run in chunks of tokens."""

    _off, _keys = "", ""

    def __init__(self, config: MemoryLeanConfig, offload: ActivationOffload | None) -> None:
        self._config, self._offload = config, offload

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Give each decoder layer that can a forward in chunks."""
        group = None if run.session is None else run.session.groups.sp_group
        if not isinstance(self._config, AutoMemoryLeanConfig):
            turn_on_checkpointing(run.spec, "alst.memory_lean_layer", patches)
        elif not any(layer.gradient_checkpointing for layer in run.spec.checkpointed_layers):
            self._off = "auto: activations are not checkpointed when the engine is built"
        elif run.session is None and self._offload is None:
            self._off = "auto: neither sequence parallelism nor the offload is on"
        if self._off:
            return
        define_ops("gated")
        policy = None if self._offload is None else self._offload.policy
        shards = None if run.session is None else run.session.groups.sp_control_group
        sp_size = 1 if shards is None else dist.get_world_size(shards)
        on_any_shard = bool if shards is None else functools.partial(any_rank, group=shards)
        has_replicas = dist.get_world_size(run.control_group) > sp_size
        on_any_rank = functools.partial(any_rank, group=run.control_group) if has_replicas else bool
        self._layers, self._reasons = run_in_chunks(
            run.spec, self._config, group, run.calls, run.leaf, patches, policy, (on_any_shard, on_any_rank)
        )
        heads = attention_heads(run.spec.text_config)
        if group is not None and heads is not None:
            self._keys = HeadPlan(sp_size, *heads, divides_kv=True).kv_summary
        if not self._layers and not self._reasons:
            self._off = f"no decoder layers to checkpoint were found in {run.spec.name}"

    def report(self) -> list[tuple[str, str]]:
        """Return how many layers run in chunks, and why others do not."""
        if self._off:
            return [("memory-lean layer", f"off: {self._off}")]
        sizes = f"chunks of {self._config.chunk_tokens:,} tokens, tiles of {self._config.tile_tokens:,}"
        if least := self._config.min_tokens:
            sizes += f", in shards of {least:,} tokens or more"
        if self._layers and self._keys:
            sizes += f", {self._keys}"
        ordinary = [f"{number} ordinary: {reason}" for reason, number in self._reasons.items()]
        return [("memory-lean layer", "; ".join([f"{self._layers} layers in {sizes}", *ordinary]))]


def run_in_chunks(
    spec: ModelSpec,
    config: MemoryLeanConfig,
    group: Any,
    calls: ForwardContext,
    leaf: Callable[[Any], None],
    patches: PatchSet,
    policy: CheckpointPolicy | None = None,
    votes: tuple[Vote, Vote] = (bool, bool),
) -> tuple[int, Counter[str]]:
    """Give each checkpointed decoder layer that can a forward in chunks; call it before MLPs are tiled.

    Args:
        spec: the model, whose attention is registered for the group.
        config: sizes.
        group: sequence-parallel group; None at SP 1, where attention is registered here.
        calls: state of the model's forwards.
        leaf: called with each layer, to make it a leaf whose weights ZeRO-3 gathers as one.
        patches: undoes it.
        policy: where a chunk's tensors are kept for the backward; None keeps inputs on the device.
        votes: tell if a condition holds on any rank of the sequence, and on any of all; collective.

    Returns:
        The number of layers in chunks, and the reasons why others are ordinary.
    """
    modules = {name: TiledModule(name, module) for name, module in token_wise_modules(spec).items()}
    reasons, count, checkpointed = Counter[str](), 0, set(spec.checkpointed_layers)
    references_of_a_gradient()  # outside of a backward
    stream, calls.chunks_from = ResidualStream(spec, calls, patches), config.min_tokens
    kv_groups = {} if group is None else _groups_of_kv_heads(spec, dist.get_world_size(group), patches)
    ordinary = "" if group is not None else _attention_dropout(spec) or register_on_one_rank(spec, calls, patches)
    for path, layer in spec.layers.items():
        if layer not in checkpointed:
            continue
        if reason := ordinary or _reason(layer):
            reasons[reason] += 1
            continue
        more = spec.router_classes, kv_groups
        inside = [work for name, work in modules.items() if name.startswith(f"{path}.")]
        lean = LeanLayer(layer, config, group, calls, inside, policy, stream, votes, *more)
        patches.set(layer, "forward", lean.forward)
        leaf(layer)
        count += 1
    norms = spec.norms if count else []
    for module in norms:
        norm = ChunkedNorm(module, sizes_of(config), functools.partial(new_group, policy, None), stream)
        patches.set(module, "forward", norm.forward)
    if policy is not None and count:
        policy.chunks = Chunks(count, len(norms), config.chunk_tokens, config.min_tokens)
    return count, reasons


def _groups_of_kv_heads(spec: ModelSpec, sp_size: int, patches: PatchSet) -> dict[int, Any]:
    """Build the groups of ranks that share KV heads, by their size; none if all heads are apart, or layers differ."""
    heads = attention_heads(spec.text_config)
    size = 1 if heads is None else HeadPlan(sp_size, *heads).kv_sharers
    if size == 1:
        return {}
    group = build_adjacent(size)
    patches.callback(destroy_groups, group)
    return {size: group}


def _attention_dropout(spec: ModelSpec) -> str:
    """Return why a config's dropout of attention keeps its layers on the ordinary path; empty if it has none."""
    rates = {name: rate for name, rate in vars(spec.text_config).items() if is_dropout(name, rate, of_attention=True)}
    found = ", ".join(f"{name}={rate}" for name, rate in rates.items() if rate)
    return found and f"attention with dropout ({found}) at sequence_parallel_size 1, whose draws chunks cannot repeat"


def _reason(layer: torch.nn.Module) -> str:
    """Return why a layer stays on the ordinary path, as far as its modules tell; empty if nothing does."""
    name = type(layer).__name__
    if "forward" in vars(layer) or layer._compiled_call_impl is not None:
        return f"the program has replaced or compiled {name}'s forward"
    if any(getattr(each, "attn_temperature_tuning", False) and not each.use_rope for each in layer.modules()):
        return "queries scaled by their index in the input (attn_temperature_tuning), which a chunk does not know"
    trained = (param for param in layer.parameters() if param.requires_grad)
    sums = 4 * sum(getattr(param, "ds_numel", param.numel()) for param in trained)
    if sums > _MAX_SUM_BYTES:
        sizes = f"{sums / _GIB:.1f} GiB, more than {_MAX_SUM_BYTES / _GIB:.0f}"
        return f"the fp32 sums of {name}'s weight gradients take {sizes}"
    return ""

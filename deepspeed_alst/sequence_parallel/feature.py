"""``sequence_parallel_size``: attention, loss and loaders over the ranks of a sequence.

Outside the model only two entries are added, under a name of the model's own, in transformers' attention and mask
interfaces: other models in the process keep theirs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.attention.head_plan import HeadPlan, attention_heads
from deepspeed_alst.attention.hf_attention import find_backend, register_attention
from deepspeed_alst.attention.private_config import own_config
from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.forward_context import ForwardContext, check_calls
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.mesh import build_adjacent, destroy_groups
from deepspeed_alst.distributed.sequence_loss import (
    IGNORED_LABEL,
    shard_divisor,
    sum_over_shards,
    whole_sequence_divisor,
)
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.kernels import define_ops
from deepspeed_alst.linear_attention.layers import has_attention, linear_layers
from deepspeed_alst.random_draws.model_draws import count_draws
from deepspeed_alst.sequence_parallel.batch_check import check_batches
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.tiling.lazy_logits import LazyLogits, share_of_loss
from deepspeed_alst.tiling.trl_fused_head import sum_fused_head

_WHOLE_LOSS = "of the whole sequence on every rank"
_SHARD_LOSS = (
    "of this rank's shard, which the program aggregates (DeepSpeed's mpu); TiledMLP, TiledFusedLogitsLoss: ours"
)


class SequenceParallel(Feature):
    """Ulysses sequence parallelism."""

    def __init__(self, session: Session) -> None:
        self._session = session
        define_ops("pack_heads")  # for the trial of a tiny model too

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the model's attention, positions and loss."""
        session, is_upstream = self._session, run.upstream is not None
        attention = patch_model(run.spec, session.groups.sp_group, patches, session.calls, not is_upstream)
        loss = _SHARD_LOSS if is_upstream else _WHOLE_LOSS
        if session.splits_decoder and not run.spec.is_multimodal:
            loss = f"the program's or {type(run.spec.whole).__name__}'s own, of whole sequences"
        self._rows = [("attention", attention), ("loss", loss)]

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Attach the session."""
        self._session.attach(engine)

    def report(self) -> list[tuple[str, str]]:
        """Return the rows of attention and loss."""
        return self._rows


class BatchCheck(Feature):
    """Check that every batch is a shard of the same sequence on all ranks, which plans its offload too."""

    def __init__(self, session: Session, planner: Any) -> None:
        self._session, self._planner = session, planner

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Add the check to the model's forward."""
        check_batches(run.spec, self._session.groups, self._session.calls, patches, self._planner)


def patch_model(
    spec: ModelSpec, group: Any, patches: PatchSet, calls: ForwardContext | None = None, whole_loss: bool = True
) -> str:
    """Patch a verified model for sequence parallelism over a group; return a description.

    Args:
        spec: the model.
        group: sequence-parallel group.
        patches: undo stack.
        calls: counts the calls of the patched parts in each forward.
        whole_loss: if True the loss is the whole sequence's; else the shard's, which the program aggregates.
    """
    calls, base = calls or ForwardContext(), spec.model
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    calls.makes_whole_loss, calls.expects_attention = whole_loss, has_attention(base)
    calls.core = name = base.config._attn_implementation
    own_config(spec.outer, base.config, patches)
    parts = []
    if calls.expects_attention:
        core = find_backend(name)
        assert core is not None, "check_model refuses it"
        register_attention(base, core, group, calls, patches)
        _group_sharers_of_kv_heads(spec, ranks, calls, patches)
        parts.append(f"{name} over {ranks} ranks, 2 all-to-alls per layer and pass")
    if any(map(_uses_length_or_position, base.modules())):
        from deepspeed_alst.sequence_parallel import hf_positions

        hf_positions.give_whole_length(base, calls, patches)
        hf_positions.scale_queries_by_position(base, rank, calls, patches)
    if linear := len(linear_layers(base)):
        from deepspeed_alst.linear_attention.sharded_layers import shard_linear_layers

        shard_linear_layers(base, group, calls, patches)
        parts.append(f"{linear} layers without attention over {ranks} ranks, up to 4 all-to-alls")
    _replace_loss(base, group, calls, patches)
    if whole_loss:
        sum_fused_head(spec, group, calls, patches)
    calls.routes = bool(spec.router_classes)
    if calls.routes:
        from deepspeed_alst.moe.mixtures import whole_router_loss

        whole_router_loss(spec, group, calls, patches)
    if hasattr(base, "generate"):
        patches.wrap(base, "generate", without_split(base.config, calls))
    check_calls(spec, calls, patches, whole_loss)
    calls.draws.sp_rank, calls.draws.sp_size = rank, ranks
    count_draws(spec, calls, patches)
    return f"{spec.name}: {'; '.join(parts)}"


def _group_sharers_of_kv_heads(spec: ModelSpec, sp_size: int, calls: ForwardContext, patches: PatchSet) -> None:
    """Build the groups of ranks of a node that gather K and V, if nodes divide a sequence. Collective."""
    heads = attention_heads(spec.text_config)
    size = HeadPlan(sp_size, *heads, node_size=calls.node_size).kv_parts if heads else 1
    if size > 1:
        calls.kv_groups = {size: build_adjacent(size)}
        patches.callback(destroy_groups, calls.kv_groups[size])


def _uses_length_or_position(module: torch.nn.Module) -> bool:
    """Return True if a module may use more of a sequence than its position ids (hf_positions.py)."""
    return getattr(module, "rope_type", "default") != "default" or hasattr(module, "attn_temperature_tuning")


def _replace_loss(model: torch.nn.Module, group: Any, calls: ForwardContext, patches: PatchSet) -> None:
    """Replace the loss by that of the sequence over ``group``, or of the shard if the program aggregates it."""
    original = model.loss_function

    @torch.compiler.disable
    def loss_function(
        logits: torch.Tensor | LazyLogits,
        labels: torch.Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        ignore_index: int = IGNORED_LABEL,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if calls.whole:
            return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        if shift_labels is None or ignore_index != IGNORED_LABEL:
            raise UnsupportedModelError(
                f"{type(model).__name__} called its loss with shift_labels={shift_labels} and "
                f"ignore_index={ignore_index}: only shifted labels and {IGNORED_LABEL} are verified"
            )
        if not calls.makes_whole_loss:
            calls.loss += 1
            return share_of_loss(logits, shift_labels, shard_divisor(shift_labels, num_items_in_batch))
        # A program may leave labels on the host, where the group has no backend.
        divisor = whole_sequence_divisor(shift_labels.to(logits.device), group, num_items_in_batch)
        loss = sum_over_shards(share_of_loss(logits, shift_labels, divisor), group)
        calls.note_loss(loss)
        return loss

    patches.set(model, "_loss_function", loss_function)


def without_split(config: Any, calls: ForwardContext) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a wrapper that runs ``generate`` unsharded: every rank from its own prompts, as at SP 1."""

    def wrap(generate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(generate)
        def unsplit(*args: Any, **kwargs: Any) -> Any:
            with calls.unsplit(config):
                return generate(*args, **kwargs)

        return unsplit

    return wrap

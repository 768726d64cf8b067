"""One measurement for ``ds_alst plan``: a step of a small model on fake tensors, with the features of a ds_config.

Legend: P = sp_size, s tokens of a rank's shard.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeed_alst.attention import row_attention, ulysses
from deepspeed_alst.attention.attention_cache import saving_frame
from deepspeed_alst.attention.head_plan import HeadPlan, attention_heads
from deepspeed_alst.attention.rectangles import of_size, rectangles
from deepspeed_alst.attention.row_attention import RowCall
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError, UnsupportedModelError
from deepspeed_alst.kernels.head_layout import Shares, uneven_sizes
from deepspeed_alst.liger.hf_liger import use_liger_without_data
from deepspeed_alst.memory_lean import core as lean_core
from deepspeed_alst.memory_lean.feature import run_in_chunks
from deepspeed_alst.memory_lean.key_blocks import KeyBlocks
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.budget import LayerSizes
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy, apply_checkpoint_policy
from deepspeed_alst.offload.feature import keep_last, layer_sizes
from deepspeed_alst.offload.host_buffers import HostBufferPool
from deepspeed_alst.profiler.fake import Known, fake_world
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.profiler.owners import FORWARD, Sample
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.tiling.tiled_loss import tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from deepspeed_alst.verification.hf_tiny_models import causal_lm

FEW_TOKENS = 8192  # of the first step, and of the measurement of what is saved, which is proportional to them


class Flops(NamedTuple):
    """Matrix FLOPs of a token, attention's scores excluded."""

    forward: float
    """In a layer's forward."""
    layer: float
    """In a layer's forward, recomputation and backward."""
    head: float
    """In the logits and the loss, forward and backward."""


class Bytes(NamedTuple):
    """Bytes of one measurement: peaks as in ``Layer``, and those saved for the backward on the device and the host."""

    attention: int
    elsewhere: int
    outside: int
    saved: int
    host: int
    flops: Flops


def bytes_of(config: Any, keys: AlstConfig, tokens: int, num_saved: int = 0) -> tuple[Bytes, LayerSizes]:
    """Measure the largest rank with s ``tokens``, in bf16, with checkpointed layers; return the offload's sizes too.

    The first ``num_saved`` layers save attention's output.

    Raises:
        UnsupportedModelError: the model does not run on fake tensors.
    """
    sp_size, heads = keys.sequence_parallel_size, attention_heads(config)
    try:
        with fake_world(sp_size, HeadPlan(sp_size, *heads).largest_rank if heads else 0), PatchSet() as patches:
            model = causal_lm(config).train()
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            spec = ModelSpec(model)
            policy = _patch(spec, keys, num_saved, patches)
            # Not measured: patches may still set themselves up in the first step, which is slow in chunks.
            first = min(tokens, FEW_TOKENS)
            with _known(spec, keys, first):
                model(**_batch(config, first), use_cache=False).loss.backward()
                model.zero_grad()
            with _known(spec, keys, tokens):
                sizes = layer_sizes(spec, keep_last(keys.alst), policy.chunks, sp_size)
                return _peaks(spec, _batch(config, tokens)), sizes
    except Exception as error:
        if isinstance(error, AlstError):
            raise
        raise UnsupportedModelError(
            f"--model: cannot be planned for, as it fails on fake tensors with {type(error).__name__}: "
            f"{str(error).splitlines()[0][:100]}"
        ) from error


def _known(spec: ModelSpec, keys: AlstConfig, tokens: int) -> Known:
    experts, config, lean = max(spec.expert_counts, default=0), spec.text_config, keys.alst.memory_lean_layer
    routed = tokens if lean is None else min(tokens, lean.chunk_tokens)
    return Known(tokens, routed * (getattr(config, "num_experts_per_tok", 1) or 1) // experts if experts else 0)


def _batch(config: Any, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(tokens).remainder(config.vocab_size)[None]
    return {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "labels": ids, "shift_labels": ids}


def _patch(spec: ModelSpec, keys: AlstConfig, num_saved: int, patches: PatchSet) -> CheckpointPolicy:
    """Patch a model as its features do on a GPU, in their order."""
    calls, alst = ForwardContext(saving_frame=saving_frame), keys.alst
    shorten(patches)
    offloads = alst.activation_checkpoint_cpu_offload is not None
    store = ActivationStore(HostBufferPool()) if offloads else None
    policy = CheckpointPolicy(store, keep_last(keys.alst), num_saved=num_saved)
    patch_model(spec, dist.group.WORLD, patches, calls)
    if offloads or num_saved:
        apply_checkpoint_policy(spec, policy, patches)
    use_liger_without_data(spec, keys, patches)
    if (lean := alst.memory_lean_layer) is not None:
        group = None if keys.sequence_parallel_size == 1 else dist.group.WORLD
        run_in_chunks(spec, lean, group, calls, lambda module: None, patches, policy)
    if alst.tiled_mlp_compute is not None:
        tile_mlps(spec, alst.tiled_mlp_compute, lambda module: None, patches)
    if (loss := keys.tiled_loss()) is not None:
        # Which kernels run depends on this machine, and the plan must not.
        loss = loss.model_copy(update={"backend": "torch"})
        tile_loss(spec, loss, calls, lambda module: None, patches)
    return policy


def shorten(patches: PatchSet) -> None:
    """Run few of a pass's many equal steps on fake tensors, which need as much memory as all, one after the other.

    Buffers of ranks with unequal shares are allocated, and neither filled nor read: a copy per rank and tensor.
    """
    for module in (row_attention, lean_core):
        patches.set(module, "rectangles", _ends(rectangles))
    for owner, name in ((RowCall, "pieces"), (lean_core.Core, "pieces"), (KeyBlocks, "blocks_with")):
        patches.wrap(owner, name, _ends)
    patches.set(row_attention, "of_size", _ends(of_size))
    patches.set(ulysses, "pack_uneven", _buffer)
    patches.set(ulysses, "unpack_uneven_", _sums)


def _ends(function: Callable[..., Iterable[Any]]) -> Callable[..., list[Any]]:
    """Wrap a function to return the first two and the last of what it gives: two are in work at a time."""

    def few(*arguments: Any) -> list[Any]:
        found = list(function(*arguments))
        return [*found[:2], *found[2:][-1:]]

    return few


def _buffer(tensors_BHsD: Sequence[torch.Tensor], shares: Sequence[Shares]) -> tuple[torch.Tensor, list[int]]:
    sizes = uneven_sizes(tensors_BHsD[0].shape[0], [x.shape[3] for x in tensors_BHsD], shares)
    return tensors_BHsD[0].new_empty(sum(sizes)), sizes


def _sums(buffer_n: torch.Tensor, tensors_BHsD: Sequence[torch.Tensor], shares: Sequence[Shares]) -> None:
    """Allocate what ``merge_heads_`` does for a KV head on several ranks: its sum, the next rank's, and the new sum."""
    for x_BHsD, of_ranks in zip(tensors_BHsD, shares, strict=True):
        if len(set(of_ranks)) < len(of_ranks):
            x_BHsD.new_empty(3, *x_BHsD[:, : len(of_ranks[0].heads)].shape, dtype=torch.float32)


def _peaks(spec: ModelSpec, batch: dict[str, torch.Tensor]) -> Bytes:
    def beside_weights(sample: Sample) -> int:
        return sample.total - sample.bytes["weights"] - sample.bytes["gradients"]

    with Ledger(spec.model) as ledger:
        loss = spec.model(**batch, use_cache=False).loss
        end = ledger.timeline[-1]
        loss.backward()
    layers, peaks = tuple(f"{name}." for name in spec.layers), dict.fromkeys(Bytes._fields[:3], 0)
    for sample in ledger.timeline:
        _, module, operator = sample.moment
        inside = "elsewhere" if f"{module}.".startswith(layers) else "outside"
        place = "attention" if "attention" in operator and "backward" in operator else inside
        peaks[place] = max(peaks[place], beside_weights(sample))
    flops = _flops(ledger, batch["labels"].numel())
    return Bytes(**peaks, saved=beside_weights(end), host=end.bytes["host"], flops=flops)


def _flops(ledger: Ledger, tokens: int) -> Flops:
    matrices = {spent: flops for spent, flops in ledger.spent.items() if "attention" not in spent.operator}
    head = sum(flops for spent, flops in matrices.items() if spent.category == "logits")
    forward = sum(flops for spent, flops in matrices.items() if spent.part == FORWARD and spent.category != "logits")
    return Flops(forward / tokens, (sum(matrices.values()) - head) / tokens, head / tokens)

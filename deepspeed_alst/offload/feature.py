"""``alst.activation_checkpoint_cpu_offload`` and ``alst.save_attention_output``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from deepspeed_alst.attention.attention_cache import saving_frame
from deepspeed_alst.attention.head_plan import HeadPlan, attention_heads
from deepspeed_alst.attention.hf_one_rank import cache_attention, check_attention_can_be_saved
from deepspeed_alst.config.schema import AlstBlockConfig, OffloadConfig, Packing
from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import agree, ranks_on_host
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.kernels import define_ops
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.budget import LayerSizes, MemoryBudget, available_bytes, describe_output, make_plan
from deepspeed_alst.offload.checkpoint_inputs import (
    CheckpointPolicy,
    Chunks,
    apply_checkpoint_policy,
    check_checkpointing,
    turn_on_checkpointing,
)
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import CopyStream, HostBufferPool
from deepspeed_alst.offload.swapper import Swapper
from deepspeed_alst.report import print_report

_PACKING = {
    False: "none: the model is not bf16",
    "lossless": "lossless, bf16 tensors to 0.73 of their size",
    "auto": "auto: decided at the first step",
}
_OUTPUT = {True: "saved", False: "recomputed", "auto": "auto: decided at the first step"}


class LocalBatch(NamedTuple):
    """Tokens of a rank's shard, B*s, its batch size B and its available memory before a forward."""

    tokens: int
    batch_size: int
    memory: MemoryBudget


class ActivationOffload(Feature):
    """Offload of checkpointed layers' activations, by a plan made before each training forward."""

    _planned = 0, 0  # tokens, and those of a chunk: 0 without
    _printed: tuple[int, bool, bool] | None = None

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Wrap the layers' checkpoints; at SP 1, also plan before each forward (under SP the batch check does)."""
        alst = run.config.alst
        self._spec, self._sp_size = run.spec, run.config.sequence_parallel_size
        self._block, self._wanted = alst.activation_checkpoint_cpu_offload, alst.save_attention_output
        if self._block is not None and self._block.packing:
            define_ops("pack_bf16")
        self._turned_on = self._block is not None and turn_on_checkpointing(
            run.spec, "alst.activation_checkpoint_cpu_offload", patches
        )
        run.calls.saving_frame = saving_frame
        self.policy = CheckpointPolicy(None, keep_last(alst), must_save_attention=self._wanted is True)
        self._unsaved_reason = "" if self._wanted is False else self._cache_attention(run.calls, patches)
        apply_checkpoint_policy(run.spec, self.policy, patches)
        if run.session is None:
            patches.hook(run.spec.outer, "forward_pre", self._plan_forward, prepend=True, with_kwargs=True)

    def _cache_attention(self, calls: ForwardContext, patches: PatchSet) -> str:
        """Prepare attention to save its output; return the reason if it cannot, unless that is an error."""
        try:
            if self._sp_size == 1:
                cache_attention(self._spec.outer, patches, calls)
            else:
                check_attention_can_be_saved(self._spec.outer)
        except UnsupportedModelError as error:
            if self._wanted is True:
                raise
            return str(error)
        return ""

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Build the engine's activation store, as ``engine.alst_offload``."""
        self._ranks = ranks_on_host(run.control_group)
        with agree(run.control_group):
            if self._block is not None:
                store = self.policy.store = _build_store(self._block, torch.device(engine.device))
                patches.set(engine, "alst_offload", store)
                patches.callback(store.close)

    def report(self) -> list[tuple[str, str]]:
        """Return the rows on layer inputs and on attention's output."""
        store = self.policy.store
        if store is None:
            return [("attention output", "saved on the device")]
        checkpointed = "checkpointing turned on; " if self._turned_on else ""
        where = "host" if store.swapper is None else f"host, then {store.swapper.file.description}"
        last = f", except the last {self.policy.keep_last}" if self.policy.keep_last else ""
        registered = "page-locked" if store.pool.page_locked else "not page-locked: no CUDA"
        packs = self._block.packing if _dtype(self._spec) == torch.bfloat16 else False
        packing = f"{_PACKING[packs]}; fp16 and fp32 tensors stay as they are"
        return [
            ("offload", f"{checkpointed}layer inputs to the {where}{last}; buffers of exact size, {registered}"),
            *([("packing", packing)] if self._block.packing else []),
            ("attention output", self._unsaved_reason or _OUTPUT[self._wanted]),
        ]

    @torch.compiler.disable
    def _plan_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan a forward without sequence parallelism from each rank's own batch."""
        tokens = next((kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None), None)
        tokens = args[0] if tokens is None and args else tokens
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            raise UnsupportedModelError(
                f"alst.activation_checkpoint_cpu_offload, alst.save_attention_output: {type(module).__name__} was "
                "called without input_ids or inputs_embeds, which give the activations' sizes. Set the keys to false."
            )
        self.plan([self.local_batch(tokens.shape[:2])])

    def local_batch(self, shape: Sequence[int]) -> LocalBatch | None:
        """Describe a batch of ``[B, s]`` tokens on this rank; None if no backward follows."""
        if not (self._spec.outer.training and torch.is_grad_enabled()):
            return None
        key, memory = "alst.save_attention_output", MemoryBudget(0)
        if self._block is not None:
            key, memory = "alst.activation_checkpoint_cpu_offload", self._available_memory(self._block)
        check_checkpointing(self._spec, key)
        return LocalBatch(shape[0] * shape[1], shape[0], memory)

    def plan(self, batches: Sequence[LocalBatch | None]) -> bool:
        """Apply a plan for all ranks' batches, the same on all ranks; return True if it is a new one.

        Raises:
            OffloadError: there is not enough memory, or this rank's disk has less space than it reported.
        """
        known = [each for each in batches if each is not None]
        if not known:
            return False
        if self._block is None:
            self.policy.num_saved = len(self.policy.layers)
            return False
        largest, memories = max(known, key=lambda each: each.tokens), [each.memory for each in known]
        last, chunks = self.policy.keep_last, self.policy.chunks
        if largest.tokens < chunks.min_tokens * largest.batch_size:
            chunks = Chunks()
        chunk_tokens = chunks.tokens * largest.batch_size if chunks.layers else 0
        if largest.tokens <= self._planned[0] and chunk_tokens == self._planned[1]:
            return False
        disks = [each.disk_bytes for each in memories if each.disk_bytes is not None]
        host_bytes = min(each.host_bytes for each in memories)
        memory = MemoryBudget(host_bytes, min(disks) if disks else None, memories[0].host_budget)
        layers = layer_sizes(self._spec, last, chunks, self._sp_size, largest.batch_size, self._block.packing)
        wanted = False if self._unsaved_reason else self._wanted
        plan = make_plan(layers, largest.tokens, memory, wanted, (self._sp_size, largest.batch_size))
        store, stored = self.policy.store, (plan.layers, plan.layers.unpacked())  # overflows are stored unpacked
        sizes = [size for each in stored for size in each.tensor_bytes(largest.tokens, plan.num_saved)]
        store.pool.set_sizes(sizes)
        store.pool.budget = host_bytes - plan.staging_bytes
        if store.swapper is not None:
            store.swapper.staging.set_sizes(sizes)
            store.swapper.file.reserve(plan.disk_bytes)
        self.policy.num_saved, store.packs = plan.num_saved, bool(plan.layers.packing)
        # Set last: a batch without enough memory is rejected each time.
        self._planned = largest.tokens, chunk_tokens
        if self._printed != (decision := (plan.num_saved, plan.disk_bytes > 0, store.packs)):
            self._printed = decision
            on_disk = f", {format_bytes(plan.disk_bytes)} on disk" if plan.disk_bytes else ""
            where = f"on the host{on_disk} of a rank with {largest.tokens:,} tokens{', packed' if store.packs else ''}"
            on_host = f"{format_bytes(plan.host_bytes)} {where}"
            output = describe_output(plan.num_saved, layers.num_layers)
            reason = self._unsaved_reason or plan.reason
            print_report([("offload", on_host), ("attention output", f"{output} ({reason})")])
        return True

    def _available_memory(self, block: OffloadConfig) -> MemoryBudget:
        store, ranks = self.policy.store, self._ranks
        swapper = store.swapper
        disk = None if swapper is None else swapper.file.free_bytes // ranks + swapper.file.reserved_bytes
        if block.host_budget != "auto":
            return MemoryBudget(block.host_budget // ranks, disk, block.host_budget)
        staging_bytes = 0 if swapper is None else swapper.staging.num_bytes
        return MemoryBudget(available_bytes() // ranks + store.pool.num_bytes + staging_bytes, disk)


def _build_store(block: OffloadConfig, device: torch.device) -> ActivationStore:
    copies = CopyStream() if device.type == "cpu" else CopyStream(torch.get_device_module(device), device)
    page_locked = device.type == "cuda"
    swapper = None if block.nvme_path is None else Swapper(DiskFile(block.nvme_path), copies, page_locked)
    return ActivationStore(HostBufferPool(page_locked=page_locked), swapper, copies)


def keep_last(alst: AlstBlockConfig) -> int:
    """Return the number of last layers whose tensors the offload leaves on the device; 0 without offload."""
    block = alst.activation_checkpoint_cpu_offload
    if block is None:
        return 0
    # Chunks are prefetched one by one, so that the last layer's need not stay.
    return block.keep_last if block.keep_last is not None else int(alst.memory_lean_layer is None)


def _dtype(spec: ModelSpec) -> torch.dtype:
    return next(each.dtype for each in spec.outer.parameters() if each.is_floating_point())


def layer_sizes(
    spec: ModelSpec, num_last: int, chunks: Chunks, sp_size: int = 1, batch_size: int = 1, packing: Packing = False
) -> LayerSizes:
    """Return the sizes of the activations that checkpointed layers save, from the config and the weights.

    They are those of the rank with the most heads: some masks save attention's output before its all-to-all.
    """
    layers = [layer for layer in spec.checkpointed_layers if layer.gradient_checkpointing]
    config = spec.text_config
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None) or (hidden // heads if heads else 0)
    of_all = attention_heads(config)
    groups = HeadPlan(sp_size, *of_all).head_groups if of_all and sp_size > heads else sp_size
    most_heads = groups * -(-heads // groups)  # per token of a shard
    dtype = _dtype(spec)
    shapes = [getattr(each, "ds_shape", each.shape) for each in layers[0].parameters()] if layers else []
    return LayerSizes(
        num_layers=len(layers),
        keep_last=num_last,
        input_bytes=hidden * dtype.itemsize,
        output_bytes=most_heads * head_dim * dtype.itemsize,
        lse_bytes=4 * most_heads,
        # Excludes stacked experts: each token uses few of them.
        matrix_elements=sum(shape.numel() for shape in map(torch.Size, shapes) if len(shape) == 2),
        head_elements=heads * head_dim,
        num_lean_layers=chunks.layers,
        chunk_tokens=chunks.tokens * batch_size,
        num_norms=chunks.norms,
        packing=packing if dtype == torch.bfloat16 else False,
    )

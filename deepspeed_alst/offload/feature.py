"""``alst.activation_checkpoint_cpu_offload`` and ``alst.save_attention_output``."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from deepspeed_alst.config.schema import AlstBlockConfig, OffloadConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.distributed.collectives import agree, ranks_on_host
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.features import Feature, RunContext, print_report
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.offload.activation_store import ActivationStore, Swapper
from deepspeed_alst.offload.attention_cache import keeping_frame
from deepspeed_alst.offload.budget import Layers, MemoryBudget, decide, spare_bytes
from deepspeed_alst.offload.checkpoint_inputs import (
    Chunks,
    Keeping,
    check_checkpointing,
    keep_activations,
    turn_on_checkpointing,
)
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.hf_attention_cache import check_keeps_attention, keep_attention
from deepspeed_alst.offload.host_buffers import Copies, HostBufferPool
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext

_KEPT = {True: "saved", False: "recomputed", "auto": "auto: decided at the first step"}


class Facts(NamedTuple):
    """Tokens of a rank's shard, B*s, its batch size B and its available memory before a forward."""

    tokens: int
    batch: int
    room: MemoryBudget


class ActivationOffload(Feature):
    """Activations of checkpointed layers that are kept or offloaded, by a plan made before each training forward."""

    _planned_tokens = 0
    _printed: tuple[bool, bool] | None = None

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Register with the layers' checkpoints; at SP 1, plan before each forward (under SP the batch check does)."""
        alst = run.config.alst
        self._spec, self._sp_size = run.spec, run.config.sequence_parallel_size
        self._block, self._wanted = alst.activation_checkpoint_cpu_offload, alst.save_attention_output
        self._turned_on = self._block is not None and turn_on_checkpointing(
            run.spec, "alst.activation_checkpoint_cpu_offload", patches
        )
        run.calls.keeping_frame = keeping_frame
        self.keeping = Keeping(
            store=None,
            keep_last=keep_last(alst),
            must_keep_attention=self._wanted is True,
        )
        self._why_not = "" if self._wanted is False else self._keep_attention(run.calls, patches)
        keep_activations(run.spec, self.keeping, patches)
        if run.session is None:
            patches.hook(run.spec.outer, "forward_pre", self._plan_forward, prepend=True, with_kwargs=True)

    def _keep_attention(self, calls: ForwardContext, patches: PatchSet) -> str:
        """Prepare attention to keep its output; return the reason if it cannot, unless that is an error."""
        try:
            if self._sp_size == 1:
                keep_attention(self._spec.outer, patches, calls)
            else:
                check_keeps_attention(self._spec.outer)
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
                store = self.keeping.store = _build_store(self._block.nvme_path, torch.device(engine.device))
                patches.set(engine, "alst_offload", store)
                patches.callback(store.close)

    def report(self) -> list[tuple[str, str]]:
        """Return where activations are kept."""
        store = self.keeping.store
        if store is None:
            return [("attention output", "saved on the device")]
        checkpointed = "checkpointing turned on; " if self._turned_on else ""
        where = "host"
        if store.spill is not None:
            where = f"host, then {store.spill.file.description}"
        last = f", but for the last {self.keeping.keep_last}" if self.keeping.keep_last else ""
        registered = "page-locked" if store.pool.page_locked else "not page-locked: no CUDA"
        return [
            ("offload", f"{checkpointed}layer inputs to the {where}{last}; buffers of exact size, {registered}"),
            ("attention output", self._why_not or _KEPT[self._wanted]),
        ]

    @torch.compiler.disable
    def _plan_forward(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plan a forward without sequence parallelism from each rank's own batch."""
        tokens = next((kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None), None)
        tokens = args[0] if tokens is None and args else tokens
        if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
            raise UnsupportedModelError(
                f"alst.activation_checkpoint_cpu_offload, alst.save_attention_output: {type(module).__name__} was "
                "called without input_ids or inputs_embeds, so what will wait cannot be known. Set the keys to false."
            )
        self.decide([self.facts(tokens.shape[:2])])

    def facts(self, shape: Sequence[int]) -> Facts | None:
        """Return the facts on a batch of ``[B, s]`` tokens on this rank; None if no backward follows."""
        if not (self._spec.outer.training and torch.is_grad_enabled()):
            return None
        key, room = "alst.save_attention_output", MemoryBudget(0)
        if self._block is not None:
            key, room = "alst.activation_checkpoint_cpu_offload", self._room(self._block)
        check_checkpointing(self._spec, key)
        return Facts(shape[0] * shape[1], shape[0], room)

    def decide(self, everyone: Sequence[Facts | None]) -> bool:
        """Decide the plan from all ranks' facts, alike on all ranks; return True if there was anything to decide.

        Raises:
            OffloadError: there is not enough memory, or this rank's disk has less space than it reported.
        """
        known = [each for each in everyone if each is not None]
        if not known or max(each.tokens for each in known) <= self._planned_tokens:
            return False
        if self._block is None:
            self.keeping.keeps_attention = True
            return False
        widest, rooms = max(known, key=lambda each: each.tokens), [each.room for each in known]
        disks = [each.disk for each in rooms if each.disk is not None]
        room = MemoryBudget(min(each.host for each in rooms), min(disks) if disks else None, rooms[0].budget)
        layers = layers_of(self._spec, self.keeping.keep_last, self.keeping.chunks, widest.batch)
        wanted = False if self._why_not else self._wanted
        plan = decide(layers, widest.tokens, room, wanted, (self._sp_size, widest.batch))
        store, sizes = self._store(), layers.sizes(widest.tokens, plan.keeps_attention)
        store.pool.round_to(sizes)
        store.pool.budget = room.host - plan.ring_bytes
        if store.spill is not None:
            store.spill.ring.round_to(sizes)
            store.spill.file.reserve(plan.disk_bytes)
        self.keeping.keeps_attention = plan.keeps_attention
        # Set last: a batch without enough memory is rejected each time.
        self._planned_tokens = widest.tokens
        if self._printed != (decided := (plan.keeps_attention, plan.disk_bytes > 0)):
            self._printed = decided
            on_disk = f", {format_bytes(plan.disk_bytes)} on disk" if plan.disk_bytes else ""
            on_host = f"{format_bytes(plan.host_bytes)} on the host{on_disk} of a rank with {widest.tokens:,} tokens"
            kept = f"{_KEPT[plan.keeps_attention]} ({self._why_not or plan.reason})"
            print_report([("offload", on_host), ("attention output", kept)])
        return True

    def _store(self) -> ActivationStore:
        assert self.keeping.store is not None
        return self.keeping.store

    def _room(self, block: OffloadConfig) -> MemoryBudget:
        store, ranks = self._store(), self._ranks
        spill = store.spill
        disk = None if spill is None else spill.file.free_bytes // ranks + spill.file.reserved_bytes
        if block.host_budget != "auto":
            return MemoryBudget(block.host_budget // ranks, disk, block.host_budget)
        ring_bytes = 0 if spill is None else spill.ring.num_bytes
        return MemoryBudget(spare_bytes() // ranks + store.pool.num_bytes + ring_bytes, disk)


def _build_store(nvme_path: str | None, device: torch.device) -> ActivationStore:
    copies = Copies() if device.type == "cpu" else Copies(torch.get_device_module(device), device)
    page_locked = device.type == "cuda"
    spill = None if nvme_path is None else Swapper(DiskFile(nvme_path), copies, page_locked)
    return ActivationStore(HostBufferPool(page_locked=page_locked), spill, copies)


def keep_last(alst: AlstBlockConfig) -> int:
    """Return the number of last layers whose tensors the offload leaves on the device; 0 without offload."""
    block = alst.activation_checkpoint_cpu_offload
    if block is None:
        return 0
    # Chunks come back one ahead, so that the last layer's need not stay.
    return block.keep_last if block.keep_last is not None else int(alst.memory_lean_layer is None)


def layers_of(spec: ModelSpec, num_last: int, chunks: Chunks | None = None, batch: int = 1) -> Layers:
    """Return the sizes of the activations that checkpointed layers keep, from the config and the weights."""
    in_chunks = {}
    if chunks is not None:
        sizes = ("lean_layers", "chunk_tokens", "norms")
        in_chunks = dict(zip(sizes, (chunks.layers, chunks.tokens * batch, chunks.norms), strict=True))
    layers = [layer for layer in spec.checkpointed_layers if layer.gradient_checkpointing]
    config = spec.text_config
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 0)
    head_elements = heads * (getattr(config, "head_dim", None) or (hidden // heads if heads else 0))
    itemsize = next(each.dtype for each in spec.outer.parameters() if each.is_floating_point()).itemsize
    shapes = [getattr(each, "ds_shape", each.shape) for each in layers[0].parameters()] if layers else []
    return Layers(
        num_layers=len(layers),
        keep_last=num_last,
        input_bytes=hidden * itemsize,
        output_bytes=head_elements * itemsize,
        lse_bytes=4 * heads,
        # Excludes stacked experts: each token uses few of them.
        matrix_elements=sum(shape.numel() for shape in map(torch.Size, shapes) if len(shape) == 2),
        head_elements=head_elements,
        **in_chunks,
    )

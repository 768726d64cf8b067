"""Activation offload of one engine: its setup, and the memory check before each forward."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepspeed_alst.config.schema import AlstConfig, OffloadConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.core.unwrap import base_model
from deepspeed_alst.errors import UnsupportedModelError
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.budget import Bandwidth, Layers, MemoryBudget, Plan, copy_is_hidden, decide
from deepspeed_alst.offload.checkpoint_inputs import (
    Keeping,
    check_checkpointing,
    keep_activations,
    turn_on_checkpointing,
)
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.hf_attention_cache import check_keeps_attention, keep_attention
from deepspeed_alst.offload.hf_checkpoint_hook import checkpointed_layers
from deepspeed_alst.offload.host_buffers import CudaRegistry, HostBufferPool
from deepspeed_alst.offload.memory import ranks_on_host, spare_bytes
from deepspeed_alst.offload.numa import cpus_near, pci_address
from deepspeed_alst.offload.swapper import RING, Swapper
from deepspeed_alst.report import print_report

_OFFLOAD_KEY = "alst.activation_checkpoint_cpu_offload"
_ATTENTION_KEY = "alst.save_attention_output"

_KEPT = {True: "kept", False: "made again", "auto": "auto: decided at the first step"}

_COPIED = 64 * 2**20
_MATRIX = 1024
_ROUNDS = 3


@dataclass(frozen=True)
class Facts:
    """Batch size, available memory and transfer rates of one rank before a forward."""

    tokens: int
    batch: int
    room: MemoryBudget
    rates: Bandwidth


class OffloadPlanner:
    """Offload plan of one engine's layers, set up with the engine and decided before each training forward.

    Args:
        model: the engine's model, before the engine is built.
        config: this package's config.
        patches: undoes the changes.

    Raises:
        UnsupportedModelError: the layers do not support checkpointing, or not individually.
    """

    def __init__(self, model: torch.nn.Module, config: AlstConfig, patches: PatchSet) -> None:
        self._model, self._config = model, config
        self._block = config.alst.activation_checkpoint_cpu_offload
        self._wanted = config.alst.save_attention_output
        self._rates: Bandwidth | None = None
        self._planned_tokens = 0
        self._device = torch.device("cpu")
        self._turned_on = self._block is not None and turn_on_checkpointing(model, patches)
        keep_last = self._block.keep_last if self._block is not None else 0
        self.keeping = Keeping(None, keep_last, must_keep_attention=self._wanted is True)
        self.plan: Plan | None = None
        self._why_not = "" if self._wanted is False else self._keep_attention(patches)
        keep_activations(model, self.keeping, patches)

    def _keep_attention(self, patches: PatchSet) -> str:
        """Prepare attention to keep its output; return the reason if it cannot, unless that is an error."""
        try:
            if self._config.sequence_parallel_size == 1:
                keep_attention(self._model, patches)
            else:
                check_keeps_attention(self._model)
        except UnsupportedModelError as error:
            if self._wanted is True:
                raise
            return str(error)
        return ""

    def attach(self, engine: Any, patches: PatchSet) -> None:
        """Build the activation store of a built engine, as ``engine.alst_offload``.

        Raises:
            ConfigError: the disk tier's folder cannot be used.
        """
        self._device = torch.device(engine.device)
        if self._block is not None:
            self.keeping.store = _build_store(self._block, self._device)
            patches.set(engine, "alst_offload", self.keeping.store)
            patches.callback(self.keeping.store.close)

    def words(self) -> list[tuple[str, str]]:
        """Return the rows of the report."""
        store = self.keeping.store
        if store is None:
            return [("attention output", "kept on the device")]
        checkpointed = "checkpointing turned on; " if self._turned_on else ""
        where = "host"
        if store.spill is not None:
            file = store.spill.file
            where = f"host, then {file.description}" + (f" ({file.warning})" if file.warning else "")
        last = f", but for the last {self.keeping.keep_last}" if self.keeping.keep_last else ""
        registered = "page-locked" if store.pool.registry is not None else "not page-locked: no CUDA"
        return [
            ("offload", f"{checkpointed}layer inputs to the {where}{last}; buffers of exact size, {registered}"),
            ("attention output", self._why_not or _KEPT[self._wanted]),
        ]

    def _words_of_plan(self, tokens: int) -> list[tuple[str, str]]:
        assert self.plan is not None
        on_disk = f", {format_bytes(self.plan.disk_bytes)} on disk" if self.plan.disk_bytes else ""
        kept = "kept" if self.plan.keeps_attention else "made again"
        return [
            (
                "offload",
                f"{format_bytes(self.plan.host_bytes)} on the host{on_disk} of a rank with {tokens:,} tokens",
            ),
            ("attention output", f"{kept} ({self._why_not or self.plan.reason})"),
        ]

    def facts(self, shape: Sequence[int]) -> Facts | None:
        """Return the facts on a batch of ``[B, s]`` tokens on this rank; None if no backward follows.

        Raises:
            UnsupportedModelError: layers are not checkpointed, so the keys would have no effect.
        """
        if not (self._model.training and torch.is_grad_enabled()):
            return None
        check_checkpointing(self._model, _OFFLOAD_KEY if self._block is not None else _ATTENTION_KEY)
        if self._rates is None:
            # Measured only if used, since it takes time.
            measured = self._block is not None and self._wanted == "auto" and not self._why_not
            self._rates = measure(self._device, _dtype(self._model)) if measured else Bandwidth(1.0, 1.0)
        return Facts(shape[0] * shape[1], shape[0], self._room(), self._rates)

    def decide(self, everyone: Sequence[Facts | None]) -> bool:
        """Decide the plan from all ranks' facts, alike on all ranks; return True if there was anything to decide.

        Raises:
            OffloadError: there is not enough memory.
            ConfigError: this rank's disk has less space than it reported.
        """
        known = [each for each in everyone if each is not None]
        if not known or max(each.tokens for each in known) <= self._planned_tokens:
            return False
        if self._block is None:
            self.keeping.keeps_attention = self._wanted is True
            return False
        sp_size = self._config.sequence_parallel_size
        widest = max(known, key=lambda each: each.tokens)
        layers = layers_of(self._model, self._block.keep_last)
        disks = [each.room.disk for each in known if each.room.disk is not None]
        budget = None if self._block.host_budget == "auto" else self._block.host_budget
        room = MemoryBudget(min(each.room.host for each in known), min(disks) if disks else None, budget)
        rates = Bandwidth(min(each.rates.copied_bytes for each in known), max(each.rates.flops for each in known))
        is_hidden = copy_is_hidden(layers, rates, widest.tokens // widest.batch * sp_size)
        wanted, before = self._wanted if not self._why_not else False, self.plan
        self.plan = decide(layers, widest.tokens, room, wanted, is_hidden, (sp_size, widest.batch), RING)
        self._make_room(room, layers, widest.tokens)
        self.keeping.keeps_attention = self.plan.keeps_attention
        # Set last: a batch without enough memory is rejected each time.
        self._planned_tokens = widest.tokens
        if before is None or (before.keeps_attention, bool(before.disk_bytes)) != (
            self.plan.keeps_attention,
            bool(self.plan.disk_bytes),
        ):
            print_report(self._words_of_plan(widest.tokens))
        return True

    def _make_room(self, room: MemoryBudget, layers: Layers, tokens: int) -> None:
        store, plan = self.keeping.store, self.plan
        assert store is not None and plan is not None
        sizes = layers.sizes(tokens, plan.keeps_attention)
        store.pool.round_to(sizes)
        store.pool.budget = room.host - plan.ring_bytes
        if store.spill is not None:
            store.spill.ring.round_to(sizes)
            store.spill.file.reserve(plan.disk_bytes)

    def _room(self) -> MemoryBudget:
        block, store = self._block, self.keeping.store
        if block is None or store is None:
            return MemoryBudget(2**63 - 1)
        ranks = ranks_on_host()
        if block.host_budget == "auto":
            ring = store.spill.ring.num_bytes if store.spill is not None else 0
            host = spare_bytes() // ranks + store.pool.num_bytes + ring
        else:
            host = block.host_budget // ranks
        if store.spill is None:
            return MemoryBudget(host)
        file = store.spill.file
        return MemoryBudget(host, file.free_bytes // ranks + file.reserved_bytes)


def _build_store(block: OffloadConfig, device: torch.device) -> ActivationStore:
    registry, cpus = None, frozenset[int]()
    if device.type == "cuda":
        registry = CudaRegistry()
        cpus = cpus_near(pci_address(torch.cuda.get_device_properties(device)))
    pool = HostBufferPool(registry=registry, cpus=cpus)
    if block.nvme_path is None:
        return ActivationStore(pool)
    return ActivationStore(
        pool, Swapper(DiskFile(block.nvme_path), HostBufferPool(budget=0, registry=registry, cpus=cpus))
    )


def layers_of(model: torch.nn.Module, keep_last: int) -> Layers:
    """Return the sizes of the activations that checkpointed layers keep, from the config and the weights."""
    layers = [layer for layer in checkpointed_layers(model) if layer.gradient_checkpointing]
    config = base_model(model).config.get_text_config()
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", 0)
    head_elements = heads * (getattr(config, "head_dim", None) or (hidden // heads if heads else 0))
    itemsize = _dtype(model).itemsize
    shapes = [getattr(each, "ds_shape", each.shape) for each in layers[0].parameters()] if layers else []
    return Layers(
        num_layers=len(layers),
        keep_last=keep_last,
        input_bytes=hidden * itemsize,
        output_bytes=head_elements * itemsize,
        lse_bytes=4 * heads,
        # Excludes stacked experts: each token uses few of them.
        matrix_elements=sum(shape.numel() for shape in map(torch.Size, shapes) if len(shape) == 2),
        head_elements=head_elements,
    )


def measure(device: torch.device, dtype: torch.dtype) -> Bandwidth:
    """Measure device-to-host bytes/s and matmul FLOP/s; return the best of a few rounds."""
    module = torch.get_device_module(device)
    source_n = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    target_n = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=device.type == "cuda")
    size = 8 * _MATRIX if device.type == "cuda" else _MATRIX
    matrix = torch.ones(size, size, dtype=dtype, device=device)

    def best(function: Any) -> float:
        times = []
        for _ in range(1 + _ROUNDS):
            begin = time.perf_counter()
            function()
            module.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    return Bandwidth(_COPIED / best(lambda: target_n.copy_(source_n)), 2 * size**3 / best(lambda: matrix @ matrix))


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return next(each.dtype for each in model.parameters() if each.is_floating_point())

"""Device memory that a token adds to a step: memory-lean layers, the ordinary path, and DeepSpeed's own ALST.

    python -m benchmarks.memory [--quick]

One rank of a group that shares a sequence, simulated on fake tensors: forward, loss and backward of two layers in bf16,
with the model's norms and head. Weights and their gradients, which ZeRO shards, are not counted. A slope is the
difference of two lengths' peaks over that of their tokens.
"""

import argparse
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import dpo, step_time
from benchmarks.figures import Figure, Part, report
from benchmarks.tiles.shapes import REAL_SIZE, Shape
from benchmarks.tiles.systems import Step, build, put_tiles
from deepspeed_alst.attention.attention_cache import saving_frame
from deepspeed_alst.attention.head_plan import HeadPlan, attention_heads
from deepspeed_alst.attention.hf_one_rank import cache_attention
from deepspeed_alst.cli.fake_layer import shorten
from deepspeed_alst.config.schema import AlstConfig, MemoryLeanConfig, TiledLossConfig, TiledMLPConfig
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.liger.hf_liger import use_liger_without_data
from deepspeed_alst.memory_lean.feature import run_in_chunks
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy, apply_checkpoint_policy
from deepspeed_alst.offload.host_buffers import CopyStream, HostBufferPool
from deepspeed_alst.profiler.fake import Known, fake_world
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.profiler.owners import FORWARD
from deepspeed_alst.sequence_parallel.feature import patch_model

LEAN, ORDINARY, DEEPSPEED = "memory-lean layers", "ordinary path", "DeepSpeed's ALST"
WITH_LIGER = ", Liger"
SYSTEMS = (LEAN, ORDINARY, ORDINARY + WITH_LIGER, DEEPSPEED, DEEPSPEED + WITH_LIGER)
KIB, GIB = 2**10, 2**30
# RMSNorm and rotary embedding: this package's default on a GPU, beside tiled MLPs.
_LIGER = AlstConfig.model_validate({"alst": {"liger_kernel": {"swiglu": False}}})
_FORWARD, _BACKWARD, _REST = PHASES = "forward", "backward", "rest"
_COLUMNS = ("forward", "backward", "step", "fixed GiB", "host, a layer", "matrix FLOPs")
_CAPTION = (
    "KiB of device memory that a token of a rank's shard adds to the peak in the layers' forward and backward, and to "
    "the step's, which is the largest slope of these and of embeddings, norm, head and loss; GiB that do not grow; KiB "
    "on the host per token and layer; matrix FLOPs of the layers over a plain step's, attention not counted. Both of "
    "this package's paths have tiles and keep layer inputs and attention's outputs on the host; DeepSpeed's attention, "
    "TiledMLP and TiledFusedLogitsLoss run with this package's offload of layer inputs. Liger: its RMSNorm and RoPE, "
    "this package's default on a GPU.\n"
    "A ledger does not see what a kernel allocates inside. Flash attention 2's backward on CUDA takes fp32 sums for dq "
    "and expands dk and dv to the query heads: a constant in memory-lean layers, whose calls have at most a chunk's "
    "rows and key_block keys; a slope on the other paths, 32 KiB a token for Llama-3.1-8B (computed)."
)


@dataclass(frozen=True)
class Case:
    """One model and SP degree; two lengths in tokens of a rank's shard."""

    shape: Shape
    sp_size: int
    most: float
    """KiB per token that a step may add with memory-lean layers."""
    tokens: tuple[int, int] = (65536, 131072)
    most_flops: float = 1.26

    @property
    def name(self) -> str:
        """Model and SP degree."""
        return f"{self.shape.name}, SP {self.sp_size}"

    @property
    def systems(self) -> tuple[str, ...]:
        """All, but for DeepSpeed's where its degrees do not divide the heads."""
        divides = self.shape.keys["num_attention_heads"] % self.sp_size == 0
        return tuple(system for system in SYSTEMS if divides or not system.startswith(DEEPSPEED))


_8B, _70B, _32B, _A3B = (replace(shape, num_layers=2) for shape in REAL_SIZE[:4])
_SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064}
_7B = Shape("Qwen2.5-7B", "qwen2", 2, {**_SIZES, "num_attention_heads": 28, "num_key_value_heads": 4})
_LONG = 131072, 262144
CASES = (
    *(Case(_8B, 8, 24), Case(_32B, 8, 26), Case(_70B, 8, 32), Case(_7B, 8, 24)),
    *(Case(_8B, 32, 28, _LONG), Case(_8B, 64, 28, _LONG), Case(_70B, 64, 36, _LONG)),
    # Experts run again in the backward, as in any checkpoint: 4/3, and K and V once more.
    Case(_A3B, 8, 24, most_flops=1.35),
)


@dataclass(frozen=True)
class Peaks:
    """One step's bytes and FLOPs."""

    device: dict[str, int]
    """Peak by phase, without weights and their gradients."""
    host: int
    """Bytes that the first layer keeps on the host."""
    flops: float
    """Matrix FLOPs of the layers, relative to a plain step."""
    owners: Counter[str]
    """Bytes at the step's peak, by owner and by what allocated them."""


def measure(shape: Shape, sp_size: int, tokens: int, system: str) -> Peaks:
    """Run a step of one system on one rank of ``sp_size``."""
    heads = HeadPlan(sp_size, *attention_heads(shape.config()))
    with fake_world(sp_size, heads.largest_rank), PatchSet() as undo:
        shorten(undo)
        model = build(shape.config(), shape.num_layers, torch.bfloat16)
        if system.endswith(WITH_LIGER):
            use_liger_without_data(ModelSpec(model), _LIGER, undo)
        lean = MemoryLeanConfig() if system == LEAN else None
        ours = partial(put_ours, lean=lean, store=host_store(undo))
        step = (put_deepspeeds if system.startswith(DEEPSPEED) else ours)(model, sp_size, undo)
        ids = torch.arange(tokens).remainder(shape.config().vocab_size)[None]
        batch = {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "labels": ids, "shift_labels": ids}
        # The part of all experts that a token passes.
        active = getattr(model.config, "num_experts_per_tok", 0) / getattr(model.config, "num_experts", 1)
        routed = min(tokens, MemoryLeanConfig().chunk_tokens) if system == LEAN else tokens
        with Known(tokens, int(routed * active)), Ledger(model) as ledger:
            step(batch).backward()
        params = [(param.dim(), param.numel()) for param in model.model.layers.parameters()]
        matrices = sum(numel * {2: 1, 3: active}.get(dim, 0) for dim, numel in params)
        return _peaks(ledger, int(6 * matrices * tokens))


def put_ours(
    model: Any,
    sp_size: int,
    undo: PatchSet,
    *,
    lean: MemoryLeanConfig | None,
    store: ActivationStore | None,
    loss: TiledLossConfig | None = None,
) -> Step:
    """Put this package on a model: tiles, layer inputs and attention outputs in a store, or on the device."""
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    spec, calls = ModelSpec(model), ForwardContext(saving_frame=saving_frame)
    group = dist.group.WORLD if sp_size > 1 else None
    if group is None:
        cache_attention(model, undo, calls)
    else:
        patch_model(spec, group, undo, calls)
    policy = CheckpointPolicy(store, keep_last=int(lean is None), num_saved=len(spec.layers))
    apply_checkpoint_policy(spec, policy, undo)
    if lean is not None:
        run_in_chunks(spec, lean, group, calls, lambda module: None, undo, policy)
    return put_tiles(model, "ours", undo, TiledMLPConfig(), loss, calls=calls, sp_size=sp_size)


def put_deepspeeds(model: Any, sp_size: int, undo: PatchSet) -> Step:
    """Put DeepSpeed's attention and tiles on a model, and this package's offload of layer inputs."""
    import deepspeed

    from benchmarks import upstream

    deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    undo.enter_context(upstream.registered(model.config, sp_size))
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    apply_checkpoint_policy(ModelSpec(model), CheckpointPolicy(host_store(undo), keep_last=1), undo)
    return put_tiles(model, "upstream", undo, None)


def host_store(undo: PatchSet, copies: CopyStream | None = None) -> ActivationStore:
    """Create a store on the host, closed with the patches; ``copies`` are those of a GPU."""
    store = ActivationStore(HostBufferPool(page_locked=copies is not None), copies=copies)
    undo.callback(store.close)
    return store


def _peaks(ledger: Ledger, plain_flops: int) -> Peaks:
    device, host = Counter[str](), 0
    for sample in ledger.timeline:
        phase = _REST
        if sample.moment.module.startswith("model.layers."):
            phase = _FORWARD if sample.moment.part == FORWARD else _BACKWARD
        if phase == _FORWARD and sample.moment.module.startswith("model.layers.0"):
            host = max(host, sample.bytes["host"])
        device[phase] = max(device[phase], sample.total - sample.bytes["weights"] - sample.bytes["gradients"])
    owners = Counter[str]()
    for (category, moment), size in ledger.peak.parts.items():
        if category not in ("weights", "gradients"):
            owners[f"{category}: {moment}"] += size
    matrices = (size for spent, size in ledger.spent.items() if spent.category != "logits")
    flops = sum(matrices) - ledger.attention_flops
    return Peaks(dict(device), host, flops / plain_flops, owners)


@dataclass(frozen=True)
class Slopes:
    """KiB per token by phase, and the bytes of the longer length."""

    phases: dict[str, float]
    fixed: float
    """GiB of the phase with the largest slope that do not grow."""
    host: float
    longer: Peaks

    @property
    def step(self) -> float:
        """KiB per token of the step: those of the phase that decides at long sequences."""
        return max(self.phases.values())


def slopes(tokens: tuple[int, int], shorter: Peaks, longer: Peaks) -> Slopes:
    """Return what a token adds between two lengths."""
    step = tokens[1] - tokens[0]
    found = {phase: (longer.device[phase] - shorter.device[phase]) / step / KIB for phase in PHASES}
    steepest = max(found, key=lambda phase: found[phase])
    fixed = (longer.device[steepest] - found[steepest] * KIB * tokens[1]) / GIB
    return Slopes(found, fixed, longer.host / tokens[1] / KIB, longer)


def rows(quick: bool) -> Iterator[Figure]:
    """Yield a row for each case and system."""
    context = multiprocessing.get_context("spawn")
    # A process for each step: DeepSpeed's registrations are for a whole process.
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        found: list[tuple[Case, str, list[Future[Peaks]]]] = []
        for case in CASES:
            case = replace(case, tokens=(case.tokens[0] // 2, case.tokens[0])) if quick else case
            for system in case.systems:
                runs = [pool.submit(measure, case.shape, case.sp_size, count, system) for count in case.tokens]
                found.append((case, system, runs))
        for case, system, runs in found:
            shorter, longer = (run.result() for run in runs)
            yield from _rows(case, system, slopes(case.tokens, shorter, longer))


def _rows(case: Case, system: str, found: Slopes) -> Iterator[Figure]:
    kib = [found.phases[_FORWARD], found.phases[_BACKWARD], found.step, found.fixed, found.host]
    values = (*(f"{each:.1f}" for each in kib), f"{found.longer.flops:.4f}")
    if system != LEAN:
        yield Figure(f"{case.name}: {system}", values)
        return
    met = found.step <= case.most and found.longer.flops <= case.most_flops
    yield Figure(f"{case.name}: {system}", values, f"<= {case.most:g}; FLOPs <= {case.most_flops}", met)
    if not met:
        for owner, size in found.longer.owners.most_common(12):
            yield Figure(f"at the peak: {owner}", ("", "", f"{size / case.tokens[1] / KIB:.2f}", "", "", ""))


def main() -> int:
    """Print the table; return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half the lengths")
    quick = parser.parse_args().quick
    tables = {"KiB of device memory per token": Part(lambda: rows(quick), _COLUMNS, _CAPTION), "time": step_time.PART}
    tables |= {"DPO": dpo.MEMORY, "DPO's time": dpo.TIME}
    return report(__doc__, tables, tables)


if __name__ == "__main__":
    sys.exit(main())

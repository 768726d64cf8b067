"""Features that keys of the ds_config turn on: their interface, their order, and the activation report."""

import importlib
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves

if TYPE_CHECKING:
    from deepspeed_alst.grad_reduction.reduce import Reduction
    from deepspeed_alst.grad_reduction.zero_paths import ReductionPath

_SWITCHED = ("offload", "liger", "tiled MLP", "tiled loss")
_MODEL_CHECK = {
    True: "SP 1 against SP on short sequences, before the first forward; code that only long ones reach is not checked",
    False: "off: alst.check_model is false",
}


@dataclass(frozen=True)
class RunContext:
    """One call of ``deepspeed.initialize``, before its engine exists."""

    spec: ModelSpec
    """The caller's model, patched by features before the engine is built."""
    config: AlstConfig
    stage: int
    """ZeRO stage."""
    control_group: Any
    """All ranks over gloo."""
    session: Session | None
    """Sequence parallelism; None at SP 1."""
    upstream: Any
    """DeepSpeed's own sequence-parallel mpu, if the program was written for its ALST; else None."""
    calls: ForwardContext
    leaf: ZeRO3Leaves
    device: str = field(default_factory=lambda: get_accelerator().device_name())
    """Kind of the device that the engine uses."""


class Feature:
    """A part of the package that keys of the ds_config turn on; the registry builds it if they do."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the model before its engine is built."""

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Patch the engine, or set its part in ``engine.alst_features``."""

    def report(self) -> list[tuple[str, str]]:
        """Return rows of the activation report: name and description."""
        return []


def features_of(run: RunContext, bucket: str) -> list[Feature]:
    """Build the features of a run, in the order in which they patch the model; their modules load only then.

    ``bucket`` is the source of the gradient buckets' size, for the report.
    """
    block, session, found = run.config.alst, run.session, list[Feature]()

    def add(name: str, *arguments: Any) -> Any:
        folder, cls = name.split(".")
        found.append(getattr(importlib.import_module(f"deepspeed_alst.{folder}.feature"), cls)(*arguments))
        return found[-1]

    offload = liger = None
    if session is not None:
        add("sequence_parallel.SequenceParallel", session)
    if block.activation_checkpoint_cpu_offload is not None or block.save_attention_output is True:
        # After attention is patched: the checkpoint's outermost wrapper offloads its inputs.
        offload = add("offload.ActivationOffload")
    if session is not None:
        add("sequence_parallel.BatchCheck", session, offload)
    if block.liger_kernel is not False:
        # Before tiles, which run the modules that Liger has patched.
        liger = add("integrations.LigerKernels")
    loss = run.config.tiled_loss()
    if run.upstream is not None and block.tiled_logits_loss == "auto":
        loss = None  # such a program may compute its own loss from the logits
    if run.spec.with_head.head is None and block.tiled_logits_loss == "auto":
        loss = None
    makes_loss = (session is not None or loss is not None) and run.spec.head is not None
    if makes_loss:
        add("integrations.OwnLoss")
    add("grad_reduction.SeparateExperts")
    if block.memory_lean_layer is not None:
        # Before tiles: a layer in chunks runs its MLPs' own forwards.
        add("memory_lean.MemoryLeanLayers", block.memory_lean_layer, offload)
    if block.tiled_mlp_compute is not None:
        add("tiling.TiledMlp", block.tiled_mlp_compute)
    if loss is not None:
        add("tiling.TiledLoss", loss, liger)
    if run.spec.is_multimodal and session is not None:
        # After the tiled loss, whose head it calls with this rank's rows.
        add("multimodal.Multimodal", session)
    if session is not None:
        add("grad_reduction.GradReduction", session, bucket)
    add("monitoring.StepMetrics")
    return found


# --- the activation report


def print_report(rows: list[tuple[str, str]]) -> None:
    """Print rows as a table on rank 0."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    table = Table(title="deepspeed_alst", title_justify="left", show_header=False)
    for row in rows:
        table.add_row(*row)
    # Above the Trainer's progress bar. A log file has no width, and rows must not be truncated.
    with tqdm.external_write_mode(file=sys.stderr):
        Console(stderr=True, width=120).print(table)


def report_rows(run: RunContext, engine: Any, features: list[Feature], allocator: str) -> list[tuple[str, str]]:
    """Return the rows of the activation report: name and description."""
    rows = [row for feature in features for row in feature.report()]
    off = [name for name in _SWITCHED if name not in dict(rows)]
    rows += [("off", ", ".join(off))] if off else []
    memory = [("CUDA allocator", allocator)] if allocator else []
    if run.session is None:
        reason = "sequence_parallel_size is 1"
        return [("sequence parallelism", f"off: {reason}"), *rows, ("reduction", f"DeepSpeed's: {reason}"), *memory]
    groups, multiple = run.session.groups, run.config.padding_multiple()
    micro, accumulation = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    sharded = "" if engine.training_dataloader is None else "training_data is sharded; "
    check = _MODEL_CHECK[run.config.alst.check_model]
    if run.upstream is not None:
        sharded, check = "UlyssesSPDataLoaderAdapter is replaced; ", "off: the program is written for shards"
    shares = [plan.summary for plan in run.session.heads if plan.summary]
    return [
        (
            "sequence parallelism",
            "; ".join([f"{groups.sp_size} ranks per sequence, {groups.dp_size} replica(s)", *shares]),
        ),
        (
            "data",
            f"{sharded}sequences are padded to a multiple of {multiple} tokens, {multiple // groups.sp_size} per rank",
        ),
        ("optimizer step", step_words(micro, accumulation, groups.sp_size, groups.dp_size)),
        *rows,
        ("model check", check),
        *memory,
    ]


def step_words(micro: int, accumulation: int, sp_size: int, replicas: int) -> str:
    """Describe an optimizer step in samples and micro-steps."""
    samples = micro * accumulation * replicas
    words = f"{samples} samples: {accumulation} micro-steps of {micro} sample(s) on {replicas} replica(s)"
    words += f"; at SP 1 they would be {samples * sp_size} samples"
    if accumulation % sp_size:
        words += (
            f"; gradient_accumulation_steps is not a multiple of sequence_parallel_size={sp_size}, so that some steps "
            "take only some of the batches that the ranks of a sequence have loaded together"
        )
    return words


def reduction_rows(
    engine: Any, reduction: "Reduction", path: "ReductionPath", adder: str, bucket: str
) -> list[tuple[str, str]]:
    """Return the rows on the gradient sums' dtype, cost and buckets; ``bucket`` is the size's source."""
    ranks = dist.get_world_size()
    sizes = [getattr(param, "ds_numel", param.numel()) for param in engine.module.parameters() if param.requires_grad]
    numel, stage = sum(sizes), int(engine.zero_optimization_stage())
    # A parameter larger than the bucket is reduced alone.
    at_once = min(numel, max(path.bucket_size or numel, *sizes, 0))
    # Send and receive buffers, and on stage 0 this rank's shard of the sums.
    widest = max(dtype.itemsize for dtype in path.hops)
    extra = min(2 * reduction.slice_bytes, 2 * at_once * widest + (at_once // ranks * widest if stage == 0 else 0))
    wire = ", then ".join(_short(dtype) for dtype in path.hops)
    adder = f" ({adder})" if reduction.dtype == torch.float32 else ""
    buckets = f"{bucket} is not used on this path"
    if path.bucket_size is not None:
        buckets = f"{path.bucket_size:,} elements ({bucket})"
    sent = f"{format_bytes(path.bytes_sent(engine), 1)} sent per rank and step"
    return [
        ("reduction", f"ZeRO stage {stage}, summed in {_short(reduction.dtype)}{adder} over {ranks} ranks"),
        ("on the wire", f"{wire}: {sent} ({path.reductions} x {numel:,} elements)"),
        ("largest extra buffers", f"{format_bytes(extra, 1)}{path.besides}"),
        ("gradient buckets", buckets),
    ]


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

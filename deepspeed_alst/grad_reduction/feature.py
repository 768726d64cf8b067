"""``seq_parallel_communication_data_type`` and ``alst.reduction``: gradients summed over all ranks."""

import copy
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.feature import Feature, RunContext
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.grad_reduction.checks import AverageCheck
from deepspeed_alst.grad_reduction.reduce import Reduction
from deepspeed_alst.grad_reduction.zero_paths import ReductionPath, install_reduction
from deepspeed_alst.kernels.builder import load

if TYPE_CHECKING:
    from deepspeed_alst.sequence_parallel.session import Session

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GradReduction(Feature):
    """Gradient reduction on the path of the engine's ZeRO stage, and the check of its first average."""

    def __init__(self, session: "Session", bucket: str) -> None:
        self._session, self._bucket = session, bucket

    def attach_engine(self, engine: Any, run: RunContext, patches: PatchSet) -> None:
        """Replace the optimizer's reduction; watch gradients for NaN and Inf, and the first average."""
        session, config = self._session, run.config
        reduction = Reduction(_DTYPES[config.seq_parallel_communication_data_type], config.alst.reduction.slice_bytes)
        adder = load(run.device)
        path = install_reduction(engine, reduction, patches)
        session.losses.watch(engine, patches)  # which reads the norm of the reduction
        session.reduction_bytes = path.bytes_sent(engine)
        engine.alst_features.gradient_check = AverageCheck(engine, session.groups, reduction.dtype, patches)
        self._rows = _rows(engine, reduction, path, adder, self._bucket)

    def report(self) -> list[tuple[str, str]]:
        """Return dtypes, bytes on the wire and buffers."""
        return self._rows


def deepspeed_arguments(
    arguments: dict[str, Any], ds_config: dict[str, Any], config: AlstConfig, session: "Session | None"
) -> tuple[dict[str, Any], str]:
    """Return the arguments of DeepSpeed's call, and the source of its bucket size; at SP 1 they are the caller's."""
    if session is None:
        return arguments, ""
    ours = copy.deepcopy(ds_config)
    # Buckets keep the gradients' dtype if the sum is in fp32; the user's communication_data_type is for SP 1.
    ours.pop("communication_data_type", None)
    if config.seq_parallel_communication_data_type != "fp32":
        ours["communication_data_type"] = config.seq_parallel_communication_data_type
    size, source = config.alst.reduction.bucket_size, "alst.reduction.bucket_size"
    if size == "auto":
        from deepspeed_alst.grad_reduction.bucket_size import automatic_numel

        size, source = automatic_numel(arguments["model"], ds_config, session.groups.control_group)
    if size is None:
        source = "reduce_bucket_size"
    else:
        ours["zero_optimization"] = {**(ours.get("zero_optimization") or {}), "reduce_bucket_size": size}
    passed = {name: value for name, value in arguments.items() if name not in ("config_params", "training_data")}
    if arguments.get("config") is None and arguments.get("config_params") is None:
        # The config came in args. DeepSpeed rejects two, so `ours` replaces it there.
        args = copy.copy(arguments["args"])
        args.deepspeed_config, args.deepscale_config = ours, None
        return {**passed, "args": args, "mpu": session.mpu}, source
    return {**passed, "config": ours, "mpu": session.mpu}, source


def _rows(engine: Any, reduction: Reduction, path: ReductionPath, adder: str, bucket: str) -> list[tuple[str, str]]:
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

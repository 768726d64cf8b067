"""``seq_parallel_communication_data_type`` and ``alst.reduction``: gradients summed over all ranks."""

import copy
from typing import Any

import torch

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.features import Feature, RunContext, reduction_rows
from deepspeed_alst.grad_reduction.checks import AverageCheck
from deepspeed_alst.grad_reduction.reduce import Reduction
from deepspeed_alst.grad_reduction.zero_paths import install_reduction
from deepspeed_alst.kernels.builder import load
from deepspeed_alst.sequence_parallel.session import Session

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class GradReduction(Feature):
    """Gradient reduction on the path of the engine's ZeRO stage, and the check of its first average."""

    def __init__(self, session: Session, bucket: str) -> None:
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
        self._rows = reduction_rows(engine, reduction, path, adder, self._bucket)

    def report(self) -> list[tuple[str, str]]:
        """Return dtypes, bytes on the wire and buffers."""
        return self._rows


class SeparateExperts(Feature):
    """Mixtures whose experts are modules of their own: every rank gathers and reduces all of them."""

    def prepare_model(self, run: RunContext, patches: PatchSet) -> None:
        """Patch the blocks of experts, if there are any."""
        if next(run.spec.separate_experts(), None) is not None:
            from deepspeed_alst.moe.mixtures import call_together

            call_together(run.spec, run.stage, run.leaf, patches)


def deepspeed_arguments(
    arguments: dict[str, Any], ds_config: dict[str, Any], config: AlstConfig, session: Session | None
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

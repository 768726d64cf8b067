"""Features that keys of the ds_config turn on: their interface, what they are given, and their order."""

import importlib
from dataclasses import dataclass
from typing import Any

from deepspeed.accelerator import get_accelerator

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.session import Session
from deepspeed_alst.tiling.zero3_leaf import ZeRO3Leaves


@dataclass(frozen=True)
class RunContext:
    """One call of ``deepspeed.initialize``, before its engine exists."""

    spec: ModelSpec
    """The caller's model, patched by features before the engine is built."""
    config: AlstConfig
    stage: int
    """ZeRO stage."""
    device: str
    """Kind of the device that the engine uses."""
    control_group: Any
    """All ranks over gloo."""
    session: Session | None
    """Sequence parallelism; None at SP 1."""
    upstream: Any
    """DeepSpeed's own sequence-parallel mpu, if the program was written for its ALST; else None."""
    calls: ForwardContext
    leaf: ZeRO3Leaves

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        config: AlstConfig,
        stage: int,
        control_group: Any,
        session: Session | None,
        upstream: Any,
        patches: PatchSet,
    ) -> "RunContext":
        """Describe a call; see the attributes."""
        device, calls = get_accelerator().device_name(), session.calls if session else ForwardContext()
        leaf = ZeRO3Leaves(spec.outer, stage, patches)
        return cls(spec, config, stage, device, control_group, session, upstream, calls, leaf)


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

    Args:
        run: config, session and model of this call.
        bucket: description of the gradient buckets' size.
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
    makes_loss = session is not None or loss is not None
    if makes_loss:
        add("integrations.OwnLoss")
    add("grad_reduction.SeparateExperts")
    if block.tiled_mlp_compute is not None:
        add("tiling.TiledMlp", block.tiled_mlp_compute)
    if loss is not None:
        add("tiling.TiledLoss", loss, liger)
    if session is not None:
        add("grad_reduction.GradReduction", session, bucket)
    add("monitoring.StepMetrics")
    return found

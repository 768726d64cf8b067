"""The features that a ds_config turns on, in the order in which they patch the model; their modules load only then."""

import importlib
from typing import Any

from deepspeed_alst.features import Feature, RunContext


def features_of(run: RunContext, stage: int, bucket: str) -> list[Feature]:
    """Build the features of a run.

    Args:
        run: config, session and model of this call.
        stage: of ZeRO.
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
    if makes_loss or block.tiled_mlp_compute is not None:
        add("integrations.TileKernels", makes_loss)
    add("grad_reduction.SeparateExperts", stage)
    if block.tiled_mlp_compute is not None:
        add("tiling.TiledMlp", block.tiled_mlp_compute)
    if loss is not None:
        add("tiling.TiledLoss", loss, liger)
    if session is not None:
        add("grad_reduction.GradReduction", session, bucket)
    add("monitoring.StepMetrics")
    return found

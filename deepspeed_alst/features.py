"""Registry of the features that keys of the ds_config turn on, in the order in which they patch the model.

Each module is imported where its key is on, so that the others are not loaded.
"""

from typing import TYPE_CHECKING

from deepspeed_alst.core.feature import Feature, RunContext

if TYPE_CHECKING:
    from deepspeed_alst.offload.feature import ActivationOffload


def features_of(run: RunContext, bucket: str) -> list[Feature]:
    """Build the features of a run, in the order in which they patch the model.

    ``bucket`` is the source of the gradient buckets' size, for the report.
    """
    of_attention, offload = _attention_features(run)
    # Losses before layers and tiles, which run the modules that Liger has patched.
    return [*of_attention, *_layer_features(run, offload), *_step_features(run, bucket)]


def _attention_features(run: RunContext) -> tuple[list[Feature], "ActivationOffload | None"]:
    block, session, found, offload = run.config.alst, run.session, list[Feature](), None
    if session is not None:
        from deepspeed_alst.sequence_parallel.feature import SequenceParallel
        from deepspeed_alst.verification.feature import VerifiedModel

        # Before anything is patched.
        found.append(VerifiedModel(session))
        if run.upstream is not None:
            from deepspeed_alst.integrations.feature import Upstream

            found.append(Upstream(session))
        found.append(SequenceParallel(session))
        if session.splits_decoder and not run.spec.is_multimodal:
            from deepspeed_alst.whole_sequence.feature import WholeSequences

            found.append(WholeSequences(session))
    if block.activation_checkpoint_cpu_offload is not None or block.save_attention_output is True:
        # After attention is patched: the checkpoint's outermost wrapper offloads its inputs.
        from deepspeed_alst.offload.feature import ActivationOffload

        offload = ActivationOffload()
        found.append(offload)
    if session is not None:
        from deepspeed_alst.sequence_parallel.feature import BatchCheck

        found.append(BatchCheck(session, offload))
    return found, offload


def _layer_features(run: RunContext, offload: "ActivationOffload | None") -> list[Feature]:
    block, found, liger = run.config.alst, list[Feature](), None
    if block.liger_kernel is not False:
        from deepspeed_alst.liger.feature import LigerKernels

        liger = LigerKernels()
        found.append(liger)
    loss = run.config.tiled_loss()
    if block.tiled_logits_loss == "auto" and (run.upstream is not None or run.spec.with_head.head is None):
        loss = None  # a program for DeepSpeed's ALST may compute its own loss from the logits
    if (run.session is not None or loss is not None) and run.spec.head is not None:
        from deepspeed_alst.liger.feature import OwnLoss

        found.append(OwnLoss())
    if next(run.spec.separate_experts(), None) is not None:
        from deepspeed_alst.moe.feature import SeparateExperts

        found.append(SeparateExperts())
    if block.memory_lean_layer is not None:
        # Before tiles: a layer in chunks runs its MLPs' own forwards.
        from deepspeed_alst.memory_lean.feature import MemoryLeanLayers

        found.append(MemoryLeanLayers(block.memory_lean_layer, offload))
    if block.tiled_mlp_compute is not None:
        from deepspeed_alst.tiling.feature import TiledMlp

        found.append(TiledMlp(block.tiled_mlp_compute))
    if loss is not None:
        from deepspeed_alst.tiling.feature import TiledLoss

        found.append(TiledLoss(loss, liger))
    return found


def _step_features(run: RunContext, bucket: str) -> list[Feature]:
    from deepspeed_alst.monitoring.feature import StepMetrics

    found, session = list[Feature](), run.session
    if run.spec.is_multimodal and session is not None:
        # After the tiled loss, whose head it calls with this rank's rows.
        from deepspeed_alst.multimodal.feature import Multimodal

        found.append(Multimodal(session))
    if session is not None:
        from deepspeed_alst.grad_reduction.feature import GradReduction

        found.append(GradReduction(session, bucket))
    return [*found, StepMetrics()]

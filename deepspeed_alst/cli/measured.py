"""Measure the bytes that a few layers of a model need on one rank, on tensors without data."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError, UnsupportedModelError
from deepspeed_alst.integrations.hf_liger import use_liger_without_data
from deepspeed_alst.profiler.fake import fake_world
from deepspeed_alst.profiler.known import Known
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.patch_model import patch_model
from deepspeed_alst.tiling.tiled_loss import tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from deepspeed_alst.verification.hf_tiny_models import causal_lm


@dataclass(frozen=True)
class Bytes:
    """Bytes beside weights and gradients: two peaks of a step, and the level between forward and backward."""

    in_layers: int
    outside: int
    kept: int


def bytes_of(config: Any, keys: AlstConfig, tokens: int) -> Bytes:
    """Measure a model's bytes on one rank, in bf16 and with checkpointed layers.

    Args:
        config: transformers config.
        keys: tile sizes and number of ranks per sequence.
        tokens: s, tokens of this rank.

    Raises:
        UnsupportedModelError: the model does not run without data.
    """
    counts = (getattr(config, key, None) for key in ("num_experts", "num_local_experts"))
    experts = next((count for count in counts if count), 1)
    per_expert = tokens * (getattr(config, "num_experts_per_tok", 1) or 1) // experts if experts > 1 else 0
    try:
        with fake_world(keys.sequence_parallel_size), PatchSet() as patches:
            model = causal_lm(config).train()
            step = _patched(model, keys, patches)
            ids = torch.arange(tokens).remainder(config.vocab_size)[None]
            batch = {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "labels": ids, "shift_labels": ids}
            with Known(tokens, per_expert):
                return _second_step(model, step, batch)
    except AlstError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"this model cannot be planned for: on tensors without data it raises {type(error).__name__}: "
            f"{str(error).splitlines()[0][:100]}"
        ) from error


def _patched(model: Any, keys: AlstConfig, patches: PatchSet) -> Any:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls = ForwardContext()
    patch_model(model, dist.group.WORLD, patches, calls)
    use_liger_without_data(model, keys, patches)  # as on a GPU
    if keys.alst.tiled_mlp_compute is not None:
        tile_mlps(model, keys.alst.tiled_mlp_compute, lambda module: None, patches)
    if (loss := keys.tiled_loss()) is not None:
        tile_loss(model, loss, calls, lambda module: None, patches)
    return lambda batch: model(**batch, use_cache=False).loss


def _second_step(model: Any, step: Any, batch: dict[str, torch.Tensor]) -> Bytes:
    # Not measured: patches may still set themselves up in the first step.
    step(batch).backward()
    model.zero_grad()
    with Ledger(model) as ledger:
        with ledger.phase("forward"):
            loss = step(batch)
        kept = _beside_weights(ledger.timeline[-1])
        loss.backward()
    layers = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, torch.nn.ModuleList))
    peaks = {True: 0, False: 0}
    for sample in ledger.timeline:
        inside = sample.moment.module.startswith(layers)
        peaks[inside] = max(peaks[inside], _beside_weights(sample))
    return Bytes(peaks[True], peaks[False], kept)


def _beside_weights(sample: Any) -> int:
    return int(sample.total - sample.bytes["weights"] - sample.bytes["gradients"])

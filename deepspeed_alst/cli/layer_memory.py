"""Bytes that a model's layers and loss need on one rank, measured on tensors without data."""

import copy
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_alst.cli.plan import Layer, Model
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError, ConfigError, UnsupportedModelError
from deepspeed_alst.integrations.hf_liger import use_liger_without_data
from deepspeed_alst.profiler.fake import Known, fake_world
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.patch_model import patch_model
from deepspeed_alst.tiling.tiled_loss import tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from deepspeed_alst.verification.hf_parity_trial import numel
from deepspeed_alst.verification.hf_tiny_models import causal_lm, load_config

_TOKENS = (32768, 65536)  # of the two measurements of a linear fit: more than any tile has


def measure(name: str, keys: AlstConfig) -> tuple[Model, Layer]:
    """Return a model's sizes, and the bytes of one layer on one of P ranks with the ds_config's tiles."""
    whole = load_config(name, small=False).get_text_config()
    num_layers = getattr(whole, "num_hidden_layers", 0)
    if not num_layers:
        raise ConfigError(f"--model {name}: num_hidden_layers is not in its config")
    one, two = (_with_layers(whole, count) for count in (1, 2))
    largest = max(numel(causal_lm, two) - numel(causal_lm, one), whole.vocab_size * whole.hidden_size)
    a, b = _TOKENS
    (few_in, few_out, few_kept), (many_in, many_out, _) = (bytes_of(one, keys, tokens) for tokens in _TOKENS)
    *_, two_kept = bytes_of(two, keys, a)
    slope, loss_slope = (many_in - few_in) / (b - a), max(0.0, (many_out - few_out) / (b - a))
    return Model(numel(causal_lm, whole), num_layers, largest), Layer(
        fixed=max(0.0, few_in - slope * a),
        a_token=slope,
        loss_fixed=max(0.0, few_out - loss_slope * a),
        loss_a_token=loss_slope,
        kept=(two_kept - few_kept) / a,
    )


def bytes_of(config: Any, keys: AlstConfig, tokens: int) -> tuple[int, int, int]:
    """Measure one rank's peaks in layers and outside and what it keeps for the backward, beside weights and gradients.

    Args:
        config: transformers config; it is run in bf16 with checkpointed layers.
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
            _patch(model, keys, patches)
            ids = torch.arange(tokens).remainder(config.vocab_size)[None]
            batch = {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "labels": ids, "shift_labels": ids}
            with Known(tokens, per_expert):
                # Not measured: patches may still set themselves up in the first step.
                model(**batch, use_cache=False).loss.backward()
                model.zero_grad()
                return _peaks(model, batch)
    except AlstError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"this model cannot be planned for: on tensors without data it raises {type(error).__name__}: "
            f"{str(error).splitlines()[0][:100]}"
        ) from error


def _patch(model: Any, keys: AlstConfig, patches: PatchSet) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    calls = ForwardContext()
    spec = ModelSpec(model)
    patch_model(spec, dist.group.WORLD, patches, calls)
    use_liger_without_data(spec, keys, patches)  # as on a GPU
    if keys.alst.tiled_mlp_compute is not None:
        tile_mlps(spec, keys.alst.tiled_mlp_compute, lambda module: None, patches)
    if (loss := keys.tiled_loss()) is not None:
        tile_loss(spec, loss, calls, lambda module: None, patches)


def _peaks(model: Any, batch: dict[str, torch.Tensor]) -> tuple[int, int, int]:
    def beside_weights(sample: Any) -> int:
        return int(sample.total - sample.bytes["weights"] - sample.bytes["gradients"])

    with Ledger(model) as ledger:
        loss = model(**batch, use_cache=False).loss
        kept = beside_weights(ledger.timeline[-1])
        loss.backward()
    layers = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, torch.nn.ModuleList))
    peaks = {True: 0, False: 0}
    for sample in ledger.timeline:
        inside = sample.moment.module.startswith(layers)
        peaks[inside] = max(peaks[inside], beside_weights(sample))
    return peaks[True], peaks[False], kept


def _with_layers(config: Any, count: int) -> Any:
    """Return a config with layers of the last layer's kind, which usually attends to the whole sequence."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:] * count
    return config

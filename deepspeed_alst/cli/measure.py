"""Bytes of one decoder layer and of the loss, counted on fake tensors for ``ds_alst plan``.

Legend: P = sp_size, s tokens of a rank's shard, S = P*s.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.errors import AlstError, ConfigError, UnsupportedModelError
from deepspeed_alst.integrations.hf_liger import use_liger_without_data
from deepspeed_alst.memory_lean import layer as lean_layer
from deepspeed_alst.memory_lean.feature import run_in_chunks
from deepspeed_alst.memory_lean.rectangles import Rectangle, rectangles
from deepspeed_alst.offload.activation_store import ActivationStore
from deepspeed_alst.offload.attention_cache import saving_frame
from deepspeed_alst.offload.budget import LayerSizes
from deepspeed_alst.offload.checkpoint_inputs import CheckpointPolicy, apply_checkpoint_policy
from deepspeed_alst.offload.feature import keep_last, layer_sizes
from deepspeed_alst.offload.host_buffers import HostBufferPool
from deepspeed_alst.profiler.fake import Known, fake_world
from deepspeed_alst.profiler.ledger import Ledger
from deepspeed_alst.profiler.owners import Sample
from deepspeed_alst.sequence_parallel.feature import patch_model
from deepspeed_alst.sequence_parallel.forward_context import ForwardContext
from deepspeed_alst.sequence_parallel.ulysses import HeadPlan
from deepspeed_alst.tiling.tiled_loss import tile_loss
from deepspeed_alst.tiling.tiled_mlp import tile_mlps
from deepspeed_alst.verification.hf_tiny_models import causal_lm, load_config, numel

_TOKENS = 32768, 65536  # of the two measurements: more than any tile has
_FEW_TOKENS = 8192  # of the first step, and of the measurement of what is saved, which is proportional to them
_CHUNKS = 3  # at least, of a measurement: one in work, one that comes back, one that waits


class Line(NamedTuple):
    """Bytes of a rank as a function of its tokens."""

    fixed: float
    a_token: float

    def at(self, tokens: int) -> float:
        """Return the bytes for a number of tokens."""
        return self.fixed + self.a_token * tokens


@dataclass(frozen=True)
class Layer:
    """Peaks of a rank without weights and their gradients, measured on a one-layer model."""

    attention: Line
    """Peak in attention's backward, without ``workspace``."""
    elsewhere: Line
    """Peak in the rest of the layer."""
    outside: Line
    """Peak outside of layers: in the logits and the loss."""
    workspace: Line
    """Bytes that attention's kernel allocates in its backward, and frees."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model."""

    num_params: int
    largest: int
    """Elements of the largest module that ZeRO 3 gathers at once: a layer, an embedding or the head."""
    layers: LayerSizes = field(default_factory=lambda: LayerSizes(0, 0, 0, 0, 0, 0, 0))
    """Sizes of what its layers save for the backward."""


class Bytes(NamedTuple):
    """Bytes of one measurement: peaks as in ``Layer``, and those saved for the backward on the device and the host."""

    attention: int
    elsewhere: int
    outside: int
    saved: int
    host: int


def measure(path: str, keys: AlstConfig) -> tuple[Model, dict[bool, Layer]]:
    """Return a model's sizes, and one of its layers by whether attention's output is kept, where the keys allow it.

    Raises:
        ConfigError: the model is no decoder.
        UnsupportedModelError: the model does not run on fake tensors.
    """
    whole = load_config(path, small=False).get_text_config()
    num_layers = getattr(whole, "num_hidden_layers", 0)
    if not num_layers:
        raise ConfigError(f"--model {path}: its config has no num_hidden_layers; give a decoder's")
    one, two = (_with_layers(whole, count) for count in (1, 2))
    largest = max(numel(causal_lm, two) - numel(causal_lm, one), whole.vocab_size * whole.hidden_size)
    wanted = keys.alst.save_attention_output
    if wanted == "auto" and keys.alst.activation_checkpoint_cpu_offload is None:
        wanted = False
    choices, found, saved = (False, True) if wanted == "auto" else (wanted,), dict[bool, Layer](), dict[bool, int]()
    for keeps in choices:
        few, many = ((tokens, bytes_of(one, keys, tokens, keeps)[0]) for tokens in _lengths(keys))
        workspace = workspace_of(one, keys)
        found[keeps] = Layer(*(_line(few, many, name) for name in Bytes._fields[:3]), workspace)
    leaving = _all_leaving(keys)
    for keeps in {False, *choices}:
        (of_one, layers), (of_two, _) = (bytes_of(each, leaving, _FEW_TOKENS, keeps) for each in (one, two))
        on_device, on_host = of_two.saved - of_one.saved, of_two.host - of_one.host
        saved[keeps] = (on_host or on_device) // _FEW_TOKENS
    outputs = saved.get(True, saved[False]) - saved[False]
    layers = replace(
        layers,
        num_layers=num_layers,
        keep_last=keep_last(keys.alst),
        num_lean_layers=num_layers if layers.num_lean_layers else 0,
        input_bytes=saved[False],
        output_bytes=max(0, outputs - layers.lse_bytes),
        lse_bytes=min(outputs, layers.lse_bytes),
    )
    return Model(numel(causal_lm, whole), largest, layers), found


def _all_leaving(keys: AlstConfig) -> AlstConfig:
    """Return the keys with no layer whose tensors the offload leaves on the device."""
    block = keys.alst.activation_checkpoint_cpu_offload
    if block is None:
        return keys
    block = block.model_copy(update={"keep_last": 0})
    alst = keys.alst.model_copy(update={"activation_checkpoint_cpu_offload": block})
    return keys.model_copy(update={"alst": alst})


def _lengths(keys: AlstConfig) -> tuple[int, int]:
    """Return the tokens of the two measurements, of whole chunks and with as many keys as a kernel call may have."""
    lean, P = keys.alst.memory_lean_layer, keys.sequence_parallel_size
    if lean is None:
        return _TOKENS
    chunk = lean.chunk_tokens
    few = -(-max(_TOKENS[0], _CHUNKS * chunk, -(-(lean.key_block + chunk) // P)) // chunk) * chunk
    return few, few + 2 * chunk


def _line(few: tuple[int, Bytes], many: tuple[int, Bytes], name: str) -> Line:
    (a, low), (b, high) = ((tokens, getattr(found, name)) for tokens, found in (few, many))
    a_token = max(0.0, (high - low) / (b - a))
    return Line(max(0.0, low - a_token * a), a_token)


def workspace_of(config: Any, keys: AlstConfig) -> Line:
    """Return what the backward of flash attention 2 allocates beside its results.

    An fp32 ``dq_accum`` of the call's rows, and, if query heads share KV heads, ``dk_expanded`` and ``dv_expanded`` of
    its keys for each query head: ``mha_bwd`` in flash-attention's csrc/flash_attn/flash_api.cpp, of which torch has a
    copy. A call has the rows and keys of the whole sequence, in chunks those of a rectangle.
    """
    heads, P, lean = getattr(config, "num_attention_heads", 0), keys.sequence_parallel_size, keys.alst.memory_lean_layer
    if not heads:
        return Line(0, 0)
    plan = HeadPlan(P, heads, getattr(config, "num_key_value_heads", None) or heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    a_row = 4 * plan.heads_per_rank * head_dim
    a_key = 2 * 2 * plan.heads_per_rank * head_dim if plan.heads_per_rank != plan.kv_heads_per_rank else 0
    if lean is None:
        return Line(0, P * (a_row + a_key))
    return Line(lean.chunk_tokens * a_row + max(lean.chunk_tokens, lean.key_block) * a_key, 0)


def bytes_of(config: Any, keys: AlstConfig, tokens: int, saves_attention: bool = False) -> tuple[Bytes, LayerSizes]:
    """Measure a rank with s ``tokens``, in bf16, with checkpointed layers; return the offload's own sizes too.

    Raises:
        UnsupportedModelError: the model does not run on fake tensors.
    """
    try:
        with fake_world(keys.sequence_parallel_size), PatchSet() as patches:
            model = causal_lm(config).train()
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            spec = ModelSpec(model)
            policy = _patch(spec, keys, saves_attention, patches)
            # Not measured: patches may still set themselves up in the first step, which is slow in chunks.
            first = tokens if keys.alst.memory_lean_layer is None else min(tokens, _FEW_TOKENS)
            with _known(spec, first):
                model(**_batch(config, first), use_cache=False).loss.backward()
                model.zero_grad()
            with _known(spec, tokens):
                return _peaks(spec, _batch(config, tokens)), layer_sizes(spec, keep_last(keys.alst), policy.chunks)
    except Exception as error:
        if isinstance(error, AlstError):
            raise
        raise UnsupportedModelError(
            f"--model: cannot be planned for, as it fails on fake tensors with {type(error).__name__}: "
            f"{str(error).splitlines()[0][:100]}"
        ) from error


def _known(spec: ModelSpec, tokens: int) -> Known:
    experts, config = max(spec.expert_counts, default=0), spec.text_config
    return Known(tokens, tokens * (getattr(config, "num_experts_per_tok", 1) or 1) // experts if experts else 0)


def _batch(config: Any, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.arange(tokens).remainder(config.vocab_size)[None]
    return {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "labels": ids, "shift_labels": ids}


def _patch(spec: ModelSpec, keys: AlstConfig, saves_attention: bool, patches: PatchSet) -> CheckpointPolicy:
    """Patch a model as its features do on a GPU, in their order."""
    calls, alst = ForwardContext(saving_frame=saving_frame), keys.alst
    offloads = alst.activation_checkpoint_cpu_offload is not None
    store = ActivationStore(HostBufferPool()) if offloads else None
    policy = CheckpointPolicy(store, keep_last(keys.alst), saves_attention=saves_attention)
    patch_model(spec, dist.group.WORLD, patches, calls)
    if offloads or saves_attention:
        apply_checkpoint_policy(spec, policy, patches)
    use_liger_without_data(spec, keys, patches)
    if (lean := alst.memory_lean_layer) is not None:
        group = None if keys.sequence_parallel_size == 1 else dist.group.WORLD
        run_in_chunks(spec, lean, group, calls, lambda module: None, patches, policy)
        patches.set(lean_layer, "rectangles", _few_rectangles)
    if alst.tiled_mlp_compute is not None:
        tile_mlps(spec, alst.tiled_mlp_compute, lambda module: None, patches)
    if (loss := keys.tiled_loss()) is not None:
        tile_loss(spec, loss, calls, lambda module: None, patches)
    return policy


def _few_rectangles(*arguments: Any) -> list[Rectangle]:
    """Return the first and the last: those between need as much memory as the first, one after the other."""
    found = list(rectangles(*arguments))
    return [*found[:1], *found[1:][-1:]]


def _peaks(spec: ModelSpec, batch: dict[str, torch.Tensor]) -> Bytes:
    def beside_weights(sample: Sample) -> int:
        return sample.total - sample.bytes["weights"] - sample.bytes["gradients"]

    with Ledger(spec.model) as ledger:
        loss = spec.model(**batch, use_cache=False).loss
        end = ledger.timeline[-1]
        loss.backward()
    layers, peaks = tuple(f"{name}." for name in spec.layers), dict.fromkeys(Bytes._fields[:3], 0)
    for sample in ledger.timeline:
        _, module, operator = sample.moment
        inside = "elsewhere" if f"{module}.".startswith(layers) else "outside"
        place = "attention" if "attention" in operator and "backward" in operator else inside
        peaks[place] = max(peaks[place], beside_weights(sample))
    return Bytes(**peaks, saved=beside_weights(end), host=end.bytes["host"])


def _with_layers(config: Any, count: int) -> Any:
    """Return a config with layers of the last layer's kind, which usually attends to the whole sequence."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:] * count
    return config

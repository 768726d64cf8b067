"""Bytes and FLOPs of one decoder layer and of the loss, counted on fake tensors for ``ds_alst plan``.

Legend: P = sp_size, s tokens of a rank's shard, S = P*s.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from deepspeed_alst.attention.head_plan import HeadPlan, attention_heads
from deepspeed_alst.attention.row_attention import KEY_BLOCK
from deepspeed_alst.cli.fake_layer import FEW_TOKENS, Bytes, Flops, bytes_of
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.core.hf_model_spec import ModelSpec
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.monitoring.step_flops import StepFlops, step_flops
from deepspeed_alst.offload.budget import LayerSizes
from deepspeed_alst.offload.feature import keep_last
from deepspeed_alst.tiling.loss import loss_tile_rows
from deepspeed_alst.verification.hf_tiny_models import causal_lm, load_config, numel

_TOKENS = 32768, 65536  # of the two measurements: more than any tile has
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
    flops: Flops


@dataclass(frozen=True)
class Model:
    """Sizes of a model."""

    num_params: int
    largest: int
    """Elements of the largest module that ZeRO 3 gathers at once: a layer, an embedding or the head."""
    layers: LayerSizes = field(default_factory=lambda: LayerSizes(0, 0, 0, 0, 0, 0, 0))
    """Sizes of what its layers save for the backward."""
    exchanged: int = 0
    """Bytes per token of the shard that a rank sends or receives in the all-to-alls of a layer's q, k, v and output."""
    step: StepFlops | None = None
    """FLOPs in closed form; None if the config lacks a size for them."""
    imbalance: float = 1.0
    """Largest share of the query heads that a rank has, relative to the mean."""
    kv_parts: int = 1
    """Ranks that gather the keys of a shared KV head from one another."""
    kv_bytes: int = 0
    """Bytes of a rank's K and V per token of the sequence, in bf16."""


class Measuring:
    """Measurements of one model, each made once: ds_configs share those of the same layer.

    Args:
        path: a config.json, a folder or a hub name.
        node_size: ranks of a node, which divides a sequence's ranks among nodes; 0 for one node.

    Raises:
        ConfigError: the model is no decoder.
    """

    def __init__(self, path: str, node_size: int = 0) -> None:
        self._node_size = node_size
        self.config = config = load_config(path, small=False).get_text_config()
        self._num_layers = getattr(config, "num_hidden_layers", 0)
        if not self._num_layers:
            raise ConfigError(f"--model {path}: its config has no num_hidden_layers; give a decoder's")
        self._one, self._two = (_with_layers(config, count) for count in (1, 2))
        a_layer = numel(causal_lm, self._two) - numel(causal_lm, self._one)
        self._num_params, self._step = numel(causal_lm, config), _step_flops(config)
        self._largest = max(a_layer, config.vocab_size * config.hidden_size)
        self._found: dict[Any, tuple[Bytes, LayerSizes]] = {}

    def of(self, keys: AlstConfig) -> tuple[Model, dict[bool, Layer]]:
        """Return the model's sizes, and a layer by whether attention's output is kept, where the keys allow it.

        Raises:
            UnsupportedModelError: the model does not run on fake tensors.
        """
        wanted, one = keys.alst.save_attention_output, self._one
        if wanted == "auto" and keys.alst.activation_checkpoint_cpu_offload is None:
            wanted = False
        choices, found, saved = (False, True) if wanted == "auto" else (wanted,), dict[bool, Layer](), dict[bool, int]()
        for keeps in choices:
            few, many = ((tokens, self._bytes_of(one, keys, tokens, keeps)) for tokens in _lengths(keys))
            *inside, outside = (_line(few[0], few[1][0], many[0], many[1][0], name) for name in Bytes._fields[:3])
            outside = self._outside_of_long(keys, few[0]) or outside
            found[keeps], layers = Layer(*inside, outside, workspace_of(one, keys), few[1][0].flops), few[1][1]
        whole = _whole_and_leaving(keys)
        for keeps in {False, *choices}:
            of_one, of_two = (self._bytes_of(each, whole, FEW_TOKENS, keeps)[0] for each in (one, self._two))
            on_device, on_host = of_two.saved - of_one.saved, of_two.host - of_one.host
            saved[keeps] = (on_host or on_device) // FEW_TOKENS
        outputs = saved.get(True, saved[False]) - saved[False]
        offload = keys.alst.activation_checkpoint_cpu_offload
        layers = replace(
            layers,
            num_layers=self._num_layers,
            keep_last=keep_last(keys.alst),
            num_lean_layers=self._num_layers if layers.num_lean_layers else 0,
            input_bytes=saved[False],
            output_bytes=max(0, outputs - layers.lse_bytes),
            lse_bytes=min(outputs, layers.lse_bytes),
            packing=False if offload is None else offload.packing,
        )
        sizes = self._num_params, self._largest, layers, exchanged_of(one, keys, self._node_size), self._step
        if (split := head_plan(one, keys)) is None:
            return Model(*sizes), found
        plan, head_dim = split
        kv_bytes = 2 * 2 * head_dim * len(plan.kv_heads_of(plan.largest_rank))
        return Model(*sizes, plan.imbalance, plan.kv_parts, kv_bytes), found

    def _outside_of_long(self, keys: AlstConfig, few: int) -> Line | None:
        """Return ``Layer.outside`` where a tile of the loss has more than ``few`` tokens: the vocabulary is small."""
        loss = keys.tiled_loss()
        if loss is None or (tile := loss_tile_rows(loss, self.config.vocab_size)) <= few:
            return None
        untiled = keys.alst.model_copy(update={"tiled_mlp_compute": None, "memory_lean_layer": None})
        keys = keys.model_copy(update={"alst": untiled})  # tiles and chunks of so long a shard would be slow
        low, high = (self._bytes_of(self._one, keys, count * tile, False)[0] for count in (2, 4))
        return _line(2 * tile, low, 4 * tile, high, "outside")

    def _bytes_of(self, config: Any, keys: AlstConfig, tokens: int, keeps: bool) -> tuple[Bytes, LayerSizes]:
        alst = keys.alst
        of_layer = keys.sequence_parallel_size, alst.tiled_mlp_compute, alst.memory_lean_layer, alst.liger_kernel
        offloads = alst.activation_checkpoint_cpu_offload is not None, keep_last(alst)
        case = config.num_hidden_layers, *of_layer, keys.tiled_loss(), *offloads, tokens, keeps
        if case not in self._found:
            self._found[case] = bytes_of(config, keys, tokens, config.num_hidden_layers * keeps)
        return self._found[case]


def measure(path: str, keys: AlstConfig) -> tuple[Model, dict[bool, Layer]]:
    """Return ``Measuring(path).of(keys)``, with its errors."""
    return Measuring(path).of(keys)


def _step_flops(config: Any) -> StepFlops | None:
    try:
        with torch.device("meta"):
            return step_flops(ModelSpec(causal_lm(config)))
    except Exception:  # it reads values when it is built
        return None


def _whole_and_leaving(keys: AlstConfig) -> AlstConfig:
    """Return keys under which layers save as much as under these, without tiles and with all of it offloaded, if any.

    Variants with other tiles or chunks share their measurements, which are slow in chunks.
    """
    changed: dict[str, Any] = {"tiled_mlp_compute": None, "tiled_logits_loss": None, "memory_lean_layer": None}
    if (block := keys.alst.activation_checkpoint_cpu_offload) is not None:
        changed["activation_checkpoint_cpu_offload"] = block.model_copy(update={"keep_last": 0})
    return keys.model_copy(update={"alst": keys.alst.model_copy(update=changed)})


def _lengths(keys: AlstConfig) -> tuple[int, int]:
    """Return the tokens of the two measurements, of whole chunks and with as many keys as a kernel call may have."""
    lean, P = keys.alst.memory_lean_layer, keys.sequence_parallel_size
    if lean is None:
        return _TOKENS
    chunk = lean.chunk_tokens
    few = -(-max(_TOKENS[0], _CHUNKS * chunk, -(-(lean.key_block + chunk) // P)) // chunk) * chunk
    return few, few + 2 * chunk


def _line(a: int, low: Bytes, b: int, high: Bytes, name: str) -> Line:
    """Return the line through the values of a field for two numbers of tokens."""
    a_token = max(0.0, (getattr(high, name) - getattr(low, name)) / (b - a))
    return Line(max(0.0, getattr(low, name) - a_token * a), a_token)


def head_plan(config: Any, keys: AlstConfig, node_size: int = 0) -> tuple[HeadPlan, int] | None:
    """Return how heads are split over the ranks, and their size; None if the config has no heads."""
    if (heads := attention_heads(config)) is None:
        return None
    plan = HeadPlan(keys.sequence_parallel_size, *heads, keys.alst.memory_lean_layer is not None, node_size)
    return plan, getattr(config, "head_dim", None) or config.hidden_size // plan.num_heads


def exchanged_of(config: Any, keys: AlstConfig, node_size: int = 0) -> int:
    """Return ``Model.exchanged``, in bf16."""
    split = head_plan(config, keys, node_size)
    return 0 if split is None else split[0].exchanged_heads * split[1] * 2


def workspace_of(config: Any, keys: AlstConfig) -> Line:
    """Return what the backward of flash attention 2 allocates beside its results.

    An fp32 ``dq_accum`` of the call's rows, and, if query heads share KV heads, ``dk_expanded`` and ``dv_expanded`` of
    its keys for each query head: ``mha_bwd`` in flash-attention's csrc/flash_attn/flash_api.cpp, of which torch has a
    copy. A call has the rows and keys of the whole sequence, in chunks those of a rectangle, and where ranks share rows
    those of a stripe of a shard, or of two that are adjacent.
    """
    P, lean, split = keys.sequence_parallel_size, keys.alst.memory_lean_layer, head_plan(config, keys)
    if split is None:
        return Line(0, 0)
    plan, head_dim = split
    num_heads = len(plan.heads_of(plan.largest_rank))
    a_row = 4 * num_heads * head_dim
    a_key = 2 * 2 * num_heads * head_dim if num_heads != sum(plan.kv_copies_of(plan.largest_rank)) else 0
    if lean is None and plan.row_groups > 1:
        return Line(KEY_BLOCK * a_key, (a_row + a_key) / plan.row_groups)
    if lean is None:
        return Line(0, P * (a_row + a_key))
    return Line(lean.chunk_tokens * a_row + max(lean.chunk_tokens, lean.key_block) * a_key, 0)


def _with_layers(config: Any, count: int) -> Any:
    """Return a config with layers of the last layer's kind, which usually attends to the whole sequence."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:] * count
    return config

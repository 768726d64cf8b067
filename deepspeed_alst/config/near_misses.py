"""Near misses of this package's keys in a ds_config: misspelt, from another program, or in the wrong place.

Standard library only: the gate checks every ds_config. DeepSpeed ignores unknown keys.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from deepspeed_alst.formatting import as_word, shown

SP = "sequence_parallel_size"
DTYPE = "seq_parallel_communication_data_type"
BLOCK_KEYS = (
    "pad_to_multiple_of",
    "expandable_segments",
    "reduction",
    "tiled_mlp_compute",
    "tiled_logits_loss",
    "liger_kernel",
    "activation_checkpoint_cpu_offload",
    "check_model",
    "save_attention_output",
    "memory_lean_layer",
)
# Keys of the block that ALST has at the top level (arXiv:2506.13996); they work there too.
TOP_KEYS = ("activation_checkpoint_cpu_offload", "tiled_mlp_compute")

# Full path of each key.
OURS = {**{name: name for name in (SP, DTYPE, "alst")}, **{key: f"alst.{key}" for key in BLOCK_KEYS}}
OURS |= {key: key for key in TOP_KEYS}
# Synonyms: pattern of the normalized name, path of this package's key, origin.
ALIASES = (
    ("sp|spsize|spdegree", SP, "accelerate's ParallelismConfig, ColossalAI: sp_size"),
    ("cp|cpsize|contextparallel.*", SP, "Megatron-LM: --context-parallel-size; torchtitan: context_parallel_degree"),
    ("(enable|use)?seq(uence)?parallel.*", SP, "Megatron-LM: --sequence-parallel; Axolotl: sequence_parallel_degree"),
    ("ulysses.*", SP, "verl: ulysses_sequence_parallel_size"),
    ("ringattnsize", SP, "OpenRLHF: --ring_attn_size"),
    ("(deepspeed|arctic)?alst.*", "alst", "this package, with a word around its name"),
    (
        "(enable|use|apply)?liger(kernels?)?",
        "alst.liger_kernel",
        "transformers: use_liger_kernel; LLaMA-Factory: enable_liger_kernel",
    ),
    ("(enable|use)?tiled?mlp.*", "alst.tiled_mlp_compute", "Axolotl: tiled_mlp"),
    ("(enable|use)?tiled?(fused)?(logits?|loss).*", "alst.tiled_logits_loss", "DeepSpeed: TiledFusedLogitsLoss"),
    (
        "(enable|use)?activation.*offload.*|offloadactivations?|cpucheckpointing",
        "alst.activation_checkpoint_cpu_offload",
        "TRL: activation_offloading; DeepSpeed: activation_checkpointing.cpu_checkpointing",
    ),
    ("reducebucketsize", "zero_optimization.reduce_bucket_size", "DeepSpeed, in zero_optimization"),
)
# Top-level keys of DeepSpeed 0.19 and of earlier versions.
_DEEPSPEEDS = """
    activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type
    compile compression_training csv_monitor curriculum_learning data_efficiency data_parallel_size data_types
    dataloader_drop_last datastates_ckpt disable_allgather disable_python_gc dump_state eigenvalue elasticity
    expert_parallel flops_profiler fp16 fp32_allreduce gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor graph_harvesting hybrid_engine log_level managed_gradient_accumulation
    memory_breakdown nebula optimizer pipeline prescale_gradients progressive_layer_drop quantize_training scheduler
    seed sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast
    train_batch_size train_micro_batch_size_per_gpu use_data_before_expert_parallelism vocabulary_size
    wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
"""
DEEPSPEED_KEYS = frozenset(_DEEPSPEEDS.split())
# Similarity (difflib) from which a name counts as misspelt. communication_data_type has 0.79 with a key of this
# package, 'aslt' 0.75 with 'alst'; in short names the first letter must match, or 'last' would be close too.
_CLOSE, _CLOSE_SHORT, _SHORT = 0.82, 0.74, 5
# Keys are less than half as long; comparison time is quadratic.
_LONGEST_NAME = 100
# Depth limit in DeepSpeed's blocks, which have up to three levels.
_DEEPEST = 4


def near_misses(ds_config: Mapping[str, Any], nested: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield a line for each key unknown to DeepSpeed that is close to one of this package's.

    Args:
        ds_config: the whole ds_config.
        nested: keys of the inner blocks and their full paths.
    """
    places = {**dict.fromkeys(DEEPSPEED_KEYS, ""), **(nested or {}), **OURS}
    for key, value in ds_config.items():
        if key in DEEPSPEED_KEYS:
            yield from _inside(str(key), value)
        elif key == "model" and isinstance(value, Mapping) and value.get("type") == "liger":
            yield 'model.type="liger": ArcticTraining reads it; here it is "alst": {"liger_kernel": true}.'
        elif places.get(key) != key and (place := place_of(str(key), places)):
            yield correction("", str(key), place)


def ignored(ds_config: Mapping[str, Any]) -> list[str]:
    """List the keys meant for this package in a ds_config that does not enable it."""
    asking = {key: value for key, value in ds_config.items() if not _is_off(value)}
    lines = [*near_misses(asking)]
    if DTYPE in asking and ds_config.get(SP, 1) == 1:
        lines.append(f"{DTYPE}={shown(asking[DTYPE])}: it counts where {SP} is above 1.")
    return lines


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("enabled") is False
    return value is None or value is False or (type(value) in (int, float) and value in (0, 1))


def _inside(path: str, block: Any, depth: int = 1) -> Iterator[str]:
    """Yield a line for each of this package's top-level keys inside a block of DeepSpeed's."""
    if not isinstance(block, Mapping) or depth == _DEEPEST:
        return
    top = {name: name for name in (SP, DTYPE, "alst", *TOP_KEYS)}
    for key, value in block.items():
        place = place_of(str(key), top)
        if place in top and not _is_off(value):
            yield correction(path, str(key), place)
        else:
            yield from _inside(f"{path}.{as_word(str(key))}", value, depth + 1)


def correction(block: str, key: str, place: str) -> str:
    """Return the line for a key that a block does not know, with the path of the key that is meant."""
    path = f"{block}.{as_word(key)}" if block else as_word(key)
    if place.rpartition(".")[2] == key:
        return f"{path}: belongs {'into a block' if '.' in place else 'at the top level'} of the ds_config, as {place}."
    near = place.replace(f"{block}.", "") if block else place
    outside = f", outside of the {block} block" if block and near == place else ""
    return f"{path}: unknown key. Did you mean '{near}'{outside}?"


def place_of(key: str, places: Mapping[str, str]) -> str | None:
    """Return the path of the key that a key equals, resembles or is a synonym of; None if there is none.

    Args:
        key: key as the user wrote it.
        places: known keys and their paths, of which this package's have synonyms.
    """
    name = _normal(key[:_LONGEST_NAME])
    known = {_normal(each): place for each, place in places.items()}
    if name in known:
        return known[name]
    short = len(name) <= _SHORT
    rivals = [each for each in known if (each[0] == name[:1] if short else len(each) > _SHORT)]
    if near := get_close_matches(name, rivals, 1, _CLOSE_SHORT if short else _CLOSE):
        return known[near[0]]
    return next((place for pattern, place, _ in ALIASES if re.fullmatch(pattern, name)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the closest known name, or with all of them."""
    names = list(known)
    found = get_close_matches(name[:_LONGEST_NAME], names, n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else f" Known are {', '.join(names)}."


def _normal(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())

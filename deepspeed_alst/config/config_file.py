"""Reading of a ds_config as DeepSpeed does, and misspelt or misplaced keys of this package, which DeepSpeed ignores.

Standard library only: every process that imports deepspeed loads it.
"""

import base64
import binascii
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from deepspeed_alst.errors import ConfigError
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

# Only this package reads these keys, so nothing else resolves their "auto".
OWN_KEYS = ("alst", *TOP_KEYS)
# Full path of each key.
OURS = {**{name: name for name in (SP, DTYPE, *OWN_KEYS)}, **{key: f"alst.{key}" for key in BLOCK_KEYS}}
OURS |= {key: key for key in TOP_KEYS}
# Synonyms in other programs, as patterns of the normalized name, and the path of the key that is meant.
ALIASES = {
    "sp|spsize|spdegree": SP,  # accelerate's ParallelismConfig, ColossalAI
    "cp|cpsize|contextparallel.*": SP,  # Megatron-LM, torchtitan
    "(enable|use)?seq(uence)?parallel.*": SP,  # Megatron-LM, Axolotl
    "ulysses.*": SP,  # verl
    "ringattnsize": SP,  # OpenRLHF
    "(deepspeed|arctic)?alst.*": "alst",
    "(enable|use|apply)?liger(kernels?)?": "alst.liger_kernel",  # transformers, LLaMA-Factory
    "(enable|use)?tiled?mlp.*": "alst.tiled_mlp_compute",  # Axolotl
    "(enable|use)?tiled?(fused)?(logits?|loss).*": "alst.tiled_logits_loss",  # DeepSpeed's TiledFusedLogitsLoss
    "(enable|use)?activation.*offload.*": "alst.activation_checkpoint_cpu_offload",  # TRL
    "offloadactivations?|cpucheckpointing": "alst.activation_checkpoint_cpu_offload",  # DeepSpeed's other block
    "reducebucketsize": "zero_optimization.reduce_bucket_size",
}
_OPTIONS = ("--deepspeed", "--deepspeed_config", "--deepscale_config")
# Similarity (difflib) of a misspelt name. DeepSpeed's communication_data_type has 0.79 with a key of this package,
# 'aslt' 0.75 with 'alst'; short names must have the same first letter, or 'last' would be close too.
_CLOSE, _CLOSE_SHORT, _SHORT = 0.82, 0.74, 5


def read_config(text: str) -> dict[str, Any]:
    """Read a ds_config from a path or base64, like deepspeed.runtime.tensor_parallel.init_utils.load_ds_config.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is neither, is not an object, or has a duplicate key.
    """
    import hjson  # type: ignore[import-untyped]  # DeepSpeed's own reader: comments, trailing commas

    try:
        if os.path.exists(text):
            with open(text, encoding="utf-8") as file:
                ds_config = hjson.load(file, object_pairs_hook=_without_duplicates)
        else:
            ds_config = hjson.loads(base64.urlsafe_b64decode(text).decode("utf-8"))
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError("there is no such file") from error
    except (RecursionError, OverflowError) as error:  # nested too deep, a number too large
        raise ValueError(str(error)) from error
    if not isinstance(ds_config, dict):
        raise ValueError("not a JSON object; put the keys into { }")
    return ds_config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name!r} is given twice")
        found[name] = value
    return found


def config_on_command_line(argv: list[str]) -> str | None:
    """Return the value of ``--deepspeed`` or ``--deepspeed_config``, as the launcher passes it."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        given = value if equals else following
        # DeepSpeed's own --deepspeed is a flag next to --deepspeed_config.
        if option in _OPTIONS and given and not given.startswith("-"):
            return given
    return None


def find_config(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """Return the ds_config of the arguments of ``deepspeed.initialize``; None if unreadable, which DeepSpeed reports.

    The source is ``config`` (dict or path), else ``config_params``, else ``args`` under DeepSpeed's names.
    """
    args = arguments.get("args")
    places = [arguments.get("config"), arguments.get("config_params")]
    places += [getattr(args, name, None) for name in ("deepspeed_config", "deepscale_config")]
    config = next((each for each in places if each is not None), None)
    if isinstance(config, dict):
        return config
    try:
        return read_config(config) if isinstance(config, str) else None
    except (OSError, ValueError):
        return None


def is_wanted(ds_config: dict[str, Any] | None, mpu: Any = None, mesh: Any = None) -> bool:
    """Return True if the config has a key of this package, or a ``sequence_parallel_size`` > 1 for it alone.

    A program's ``mpu``, ``mesh_param`` (``mesh``), ``data_parallel_size`` and AutoSP are other readers of that key.
    """
    if not isinstance(ds_config, dict):
        return False
    if any(key in ds_config for key in OWN_KEYS):
        return True
    sp_size = ds_config.get(SP, 1)
    if (type(sp_size) is not bool and sp_size == 1) or mpu is not None or mesh or "data_parallel_size" in ds_config:
        return False
    compile_block = ds_config.get("compile")
    passes = compile_block.get("passes") if isinstance(compile_block, dict) else None
    return not (isinstance(passes, list | tuple) and "autosp" in passes)


def near_misses(ds_config: Mapping[str, Any], nested: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yield a line for each key that is close to one of this package's, or in another place.

    ``nested`` has the keys of the inner blocks and their full paths.
    """
    places = {**(nested or {}), **OURS}
    for key, value in ds_config.items():
        if key == "model" and isinstance(value, Mapping) and value.get("type") == "liger":
            yield 'model.type="liger": ArcticTraining reads it; here it is "alst": {"liger_kernel": true}.'
        elif places.get(key) != key:
            if place := place_of(str(key), places):
                yield correction("", str(key), place)
            else:
                yield from _inside(as_word(str(key)), value)


def ignored(ds_config: Mapping[str, Any]) -> list[str]:
    """List the keys meant for this package in a ds_config that does not enable it."""
    asking = {key: value for key, value in ds_config.items() if not _is_off(value)}
    lines = [*near_misses(asking)]
    if DTYPE in asking and ds_config.get(SP, 1) == 1:
        lines.append(f"{DTYPE}={shown(asking[DTYPE])}: used only with {SP} > 1.")
    return lines


def _is_off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("enabled") is False
    return value is None or value is False or (type(value) in (int, float) and value in (0, 1))


def _inside(path: str, block: Any) -> Iterator[str]:
    """Yield a line for each of this package's top-level keys inside a block of DeepSpeed's."""
    top = {name: name for name in (SP, DTYPE, *OWN_KEYS)}
    for key, value in block.items() if isinstance(block, Mapping) else ():
        place = place_of(str(key), top)
        if place in top and not _is_off(value):
            yield correction(path, str(key), place)
        else:
            yield from _inside(f"{path}.{as_word(str(key))}", value)


def correction(block: str, key: str, place: str) -> str:
    """Return the error for an unknown key of a block, with the path of the key that is meant."""
    path = f"{block}.{as_word(key)}" if block else as_word(key)
    if place.rpartition(".")[2] == key:
        return f"{path}: belongs {'in a block' if '.' in place else 'at the top level'} of the ds_config, as {place}."
    near = place.replace(f"{block}.", "") if block else place
    outside = f", outside of the {block} block" if block and near == place else ""
    return f"{path}: unknown key. Did you mean '{near}'{outside}?"


def place_of(key: str, places: Mapping[str, str]) -> str | None:
    """Return the path of the known key (``places``) that a key equals, resembles or is a synonym of, if any."""
    known = {_normal(each): place for each, place in places.items()}
    name = _normal(key)
    if name in known:
        return known[name]
    short = len(name) <= _SHORT
    rivals = [each for each in known if (each[0] == name[:1] if short else len(each) > _SHORT)]
    if near := get_close_matches(name, rivals, 1, _CLOSE_SHORT if short else _CLOSE):
        return known[near[0]]
    return next((place for pattern, place in ALIASES.items() if re.fullmatch(pattern, name)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the closest known name, or with all of them."""
    names = list(known)
    found = get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else f" Known are {', '.join(names)}."


def _normal(key: str) -> str:
    return re.sub(r"[^a-z0-9]", "", key.lower())


def check_model_file(model: str) -> None:
    """Raise ConfigError if ``--model`` is a JSON file that does not exist: no hub name, which would be looked up."""
    if model.endswith(".json") and not os.path.exists(model):
        raise ConfigError(f"--model {model}: there is no such file")

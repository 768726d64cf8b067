"""A ds_config as DeepSpeed reads it, a dict, a file or base64 in hjson; and whether it asks for this package.

Light, for the gate and for ``ds_alst report``.
"""

import base64
import os
from typing import Any

from deepspeed_alst.near_misses import SP, TOP_KEYS

# Keys that are this package's alone, whose "auto" nobody else fills in.
OWN_KEYS = ("alst", *TOP_KEYS)
_OPTIONS = ("--deepspeed", "--deepspeed_config", "--deepscale_config")


def read_config(text: str) -> dict[str, Any]:
    """Read a ds_config from a path or from base64, like deepspeed.runtime.tensor_parallel.init_utils.load_ds_config.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is neither; it holds no object; it has a key twice.
    """
    import hjson  # type: ignore[import-untyped]  # DeepSpeed's own reader: comments, trailing commas

    try:
        if os.path.exists(text):
            with open(text, encoding="utf-8") as file:
                ds_config = hjson.load(file, object_pairs_hook=_without_duplicates)
        else:
            ds_config = hjson.loads(base64.urlsafe_b64decode(text).decode("utf-8"))
    except (RecursionError, OverflowError) as error:  # endless nesting, endless numbers
        raise ValueError(str(error)) from error
    if not isinstance(ds_config, dict):
        raise ValueError("it holds no JSON object; put the keys into { }")
    return ds_config


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"keys that are given twice: {sorted({name for name in names if names.count(name) > 1})}")
    return found


def config_on_command_line(argv: list[str]) -> str | None:
    """What follows ``--deepspeed`` or ``--deepspeed_config``, as the launcher's programs are given it."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        given = value if equals else following
        # DeepSpeed's own --deepspeed is a switch beside --deepspeed_config.
        if option in _OPTIONS and given and not given.startswith("-"):
            return given
    return None


def find_config(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The ds_config as a dict, from wherever ``deepspeed.initialize`` would take it; None if there is none to read.

    ``config`` (dict or path), else ``config_params``, else what ``args`` has under DeepSpeed's names. What cannot be
    read is left for DeepSpeed to complain about.
    """
    config = arguments.get("config")
    if config is None:
        config = arguments.get("config_params")
    for name in ("deepspeed_config", "deepscale_config"):
        if config is None:
            config = getattr(arguments.get("args"), name, None)
    if isinstance(config, dict):
        return config
    try:
        return read_config(config) if isinstance(config, str) else None
    except (OSError, ValueError):
        return None


def is_wanted(ds_config: dict[str, Any] | None, mpu: Any = None, mesh: Any = None) -> bool:
    """Whether the package acts: a key of its own, or ``sequence_parallel_size`` > 1 that is nobody else's.

    Args:
        ds_config: as ``find_config`` finds it.
        mpu: an mpu of the program's.
        mesh: the ``mesh_param`` of DeepSpeed's own sequence parallelism; ``data_parallel_size`` asks for it too.
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
    return not isinstance(passes, list | tuple) or "autosp" not in passes

"""Reading of a ds_config as DeepSpeed reads it (dict, file, or base64 in hjson), and detection of this package's keys.

Lightweight, for the gate and for ``ds_alst report``.
"""

import base64
import os
from typing import Any

from deepspeed_alst.config.near_misses import SP, TOP_KEYS

# Only this package reads these keys, so nothing else resolves their "auto".
OWN_KEYS = ("alst", *TOP_KEYS)
_OPTIONS = ("--deepspeed", "--deepspeed_config", "--deepscale_config")


def read_config(text: str) -> dict[str, Any]:
    """Read a ds_config from a path or base64, like deepspeed.runtime.tensor_parallel.init_utils.load_ds_config.

    Raises:
        OSError: the file cannot be read.
        ValueError: the text is neither, holds no object, or has a duplicate key.
    """
    import hjson  # type: ignore[import-untyped]  # DeepSpeed's own reader: comments, trailing commas

    try:
        if os.path.exists(text):
            with open(text, encoding="utf-8") as file:
                ds_config = hjson.load(file, object_pairs_hook=_without_duplicates)
        else:
            ds_config = hjson.loads(base64.urlsafe_b64decode(text).decode("utf-8"))
    except (RecursionError, OverflowError) as error:  # nested too deep, a number too large
        raise ValueError(str(error)) from error
    if not isinstance(ds_config, dict):
        raise ValueError("it holds no JSON object; put the keys into { }")
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
    """Return the ds_config as a dict from the arguments of ``deepspeed.initialize``; None if unreadable.

    The source is ``config`` (dict or path), else ``config_params``, else ``args`` under DeepSpeed's names. DeepSpeed
    itself reports a config that cannot be read.
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

    Args:
        ds_config: result of ``find_config``.
        mpu: the program's mpu.
        mesh: ``mesh_param`` of DeepSpeed's own sequence parallelism; ``data_parallel_size`` requests it too.
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

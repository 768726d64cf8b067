"""Check a ds_config: this package's keys and DeepSpeed features beside them. Needs neither torch nor a GPU."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from deepspeed_alst.config.compatibility import check_features, check_numbers, wrong_blocks, zero_stage
from deepspeed_alst.config.config_file import is_wanted, read_config
from deepspeed_alst.config.parse import check_world, parse
from deepspeed_alst.errors import ConfigError


def read_json(path: str) -> dict[str, Any]:
    """Read a ds_config from a file.

    Raises:
        ConfigError: the file cannot be read or holds no ds_config.
    """
    try:
        return read_config(path)
    except (OSError, ValueError) as error:
        way_out = "Give the path of a JSON file that holds an object."
        raise ConfigError(f"--ds_config {path} cannot be read: {error}. {way_out}") from error


def problems(ds_config: Mapping[str, Any], num_ranks: int | None) -> Iterator[str]:
    """Yield the lines of all errors; the checks of a parsed config are skipped if parsing fails."""
    config, lines = _try(lambda: parse(ds_config))
    lines += _try(lambda: check_numbers(ds_config))[1] + _try(lambda: zero_stage(ds_config))[1]
    yield from lines
    if config is None or not is_wanted(ds_config):
        return
    if config.sequence_parallel_size == 1:
        yield from wrong_blocks(ds_config)
        return
    yield from _try(lambda: check_features(ds_config))[1]
    if num_ranks is not None:
        yield from _try(lambda: check_world(config, num_ranks))[1]


def _try(check: Callable[[], Any]) -> tuple[Any, list[str]]:
    try:
        return check(), []
    except ConfigError as error:
        return None, str(error).splitlines()

"""Check a ds_config: this package's keys and DeepSpeed features beside them. Needs neither torch nor a GPU."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from deepspeed_alst.cli.rows import Row
from deepspeed_alst.config.compatibility import check_features
from deepspeed_alst.config.config_file import is_wanted, read_config
from deepspeed_alst.config.ds_values import check_numbers, wrong_blocks, zero_stage
from deepspeed_alst.config.parse import check_world, parse
from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.words import shown


def read_json(path: str) -> dict[str, Any]:
    """Read a ds_config from a file.

    Raises:
        ConfigError: the file cannot be read or holds no ds_config.
    """
    try:
        return read_config(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ds_config {path} cannot be read: {error}") from error


def rows(path: Path, num_ranks: int | None) -> Iterator[Row]:
    """Yield one row per error that would stop a run with this ds_config, or one row on the run.

    Args:
        path: of the JSON file.
        num_ranks: number of ranks in the run, or None if unknown.
    """
    try:
        ds_config = read_json(str(path))
    except ConfigError as error:
        yield Row("ds_config", str(error), "problem", "give the path of a JSON file that holds an object")
        return
    lines = [*problems(ds_config, num_ranks)]
    yield from (Row("ds_config", line, "problem", f"change the key in {path}") for line in lines)
    if lines:
        return
    config = parse(ds_config)
    if missing := _missing_folder(config):
        yield Row("ds_config", missing, "problem", "make the folder on every host, or name another")
        return
    if not is_wanted(ds_config):
        yield Row(
            "ds_config",
            f"{path} asks for nothing of this package: DeepSpeed runs untouched",
            "note",
            "add sequence_parallel_size, or an alst block",
        )
        return
    yield Row("ds_config", _in_words(config, path, num_ranks))


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


def _missing_folder(config: AlstConfig) -> str:
    offload = config.alst.activation_checkpoint_cpu_offload
    if offload is not None and offload.nvme_path is not None and not Path(offload.nvme_path).is_dir():
        path = "alst.activation_checkpoint_cpu_offload.nvme_path"
        return f"{path}: no folder on this host (got {shown(offload.nvme_path)})."
    return ""


def _try(check: Callable[[], Any]) -> tuple[Any, list[str]]:
    try:
        return check(), []
    except ConfigError as error:
        return None, str(error).splitlines()


def _in_words(config: AlstConfig, path: Path, num_ranks: int | None) -> str:
    sp_size = config.sequence_parallel_size
    if sp_size == 1:
        return f"{path}: whole sequences on every rank, with the parts of the alst block"
    replicas = "" if num_ranks is None else f" in {num_ranks // sp_size} replica(s)"
    return (
        f"{path}: {sp_size} ranks share a sequence{replicas}, padded to a multiple of {config.padding_multiple()} "
        f"tokens; gradients are summed in {config.seq_parallel_communication_data_type}"
    )

"""``ds_alst report``: checks of the environment and of a ds_config, with a verdict and a remedy per row.

All that needs torch runs in a process of its own (probe.py): if torch or DeepSpeed fails to load, crashes or hangs,
that is a row of the report.
"""

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from deepspeed_alst.config.compatibility import check_features, check_world, zero_stage
from deepspeed_alst.config.config_file import is_wanted, read_config
from deepspeed_alst.config.schema import block_of, parse
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.formatting import shown

ROW_MARK = "ds_alst report: "  # begins the probe's lines; other packages write to stdout too

# Like a user's program, it imports nothing of this package: only torch's entry points may load it.
_PROGRAM = """
import faulthandler, sys
faulthandler.enable()
faulthandler.dump_traceback_later(120, exit=True)
import torch, deepspeed
hooked = hasattr(deepspeed.initialize, "__deepspeed_alst__")
sys.path.append(sys.argv[1])
from deepspeed_alst.cli import probe
probe.main(hooked, sys.argv[2])
"""
_ROOT = Path(__file__).parents[2]
_NAME = "deepspeed-alst"
_REQUIRED = (_NAME, "torch", "deepspeed", "transformers")
_OPTIONAL = ("accelerate", "triton", "liger-kernel", "peft", "trl")

Verdict = Literal["ok", "note", "problem"]


class Row(NamedTuple):
    """One check. The field names are the keys of the JSON and must not change."""

    name: str
    value: str
    verdict: Verdict = "ok"
    """``note``: a run works, with reduced speed or features. ``problem``: it fails, or deviates from the ds_config."""
    remedy: str = ""


def run(arguments: argparse.Namespace) -> int:
    """Print the report; return 1 if any row is a problem, else 0."""
    rows = [*guarded("versions", version_rows())]
    if arguments.ds_config is not None:
        rows += guarded("ds_config", config_rows(arguments.ds_config, arguments.num_gpus))
    rows += _probe(arguments.nvme_path)
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            print(f"{row.verdict:9}{row.name:{width}}  {row.value}")
            if row.remedy:
                print(f"{'':{width + 11}}-> {row.remedy}")
        verdicts = [row.verdict for row in rows]
        print(f"{verdicts.count('problem')} problems, {verdicts.count('note')} notes, {verdicts.count('ok')} ok")
        print("For DeepSpeed's ops, the CUDA toolkit and shared memory, run ds_report")
    return int(any(row.verdict == "problem" for row in rows))


def guarded(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows; an exception becomes a row, so that the other checks still run."""
    try:
        yield from rows
    except Exception as error:  # whatever a broken installation raises
        message = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        yield Row(name, message, "problem", "fix the cause, or install the package again")


def judged(name: str, value: str, wrong: str, remedy: str, verdict: Verdict = "note") -> Row:
    """Return a row with this verdict if something is wrong, else one that is ok."""
    return Row(name, f"{value}; {wrong}", verdict, remedy) if wrong else Row(name, value)


def version_of(distribution: str) -> str:
    """Return the version of a distribution, or empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_rows() -> Iterator[Row]:
    """Yield a row per distribution, its version against this package's requirement; nothing is imported."""
    lines = importlib.metadata.requires(_NAME) if version_of(_NAME) else None
    wanted = {each.name: each.specifier for each in map(Requirement, lines or ())}
    yield Row("python", f"{platform.python_version()} at {sys.executable}")
    for name in (*_REQUIRED, *_OPTIONAL):
        found, specifier = version_of(name), wanted.get(name, SpecifierSet())
        wrong = "required" if name in _REQUIRED else "optional"
        if found:
            wrong = "" if specifier.contains(found, prereleases=True) else "unsupported version"
        value = (found or "not installed") + (f" (needs {specifier})" if specifier else "")
        install = f"pip install {_ROOT}" if name == _NAME else f"pip install '{name}{specifier}'"
        yield judged(name, value, wrong, install, "problem" if name in _REQUIRED else "note")


def read_json(path: str) -> dict[str, Any]:
    """Read the file of ``--ds_config``; raise ConfigError if it is not a JSON object."""
    try:
        return read_config(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ds_config {path} cannot be read: {error}. Give the path of a JSON file.") from error


def problems(ds_config: Mapping[str, Any], num_ranks: int | None) -> list[str]:
    """Return the lines of all errors of a ds_config, for ``num_ranks`` if given."""
    lines: list[str] = []

    def checked(check: Any, *args: Any) -> Any:
        try:
            return check(*args)
        except ConfigError as error:
            lines.extend(str(error).splitlines())

    config = checked(parse, ds_config)
    checked(zero_stage, ds_config)
    if config is not None and is_wanted(ds_config) and config.sequence_parallel_size > 1:
        checked(check_features, ds_config)
        if num_ranks is not None:
            checked(check_world, config, num_ranks)
    return lines


def config_rows(path: str, num_ranks: int | None) -> Iterator[Row]:
    """Yield a row per error that would stop a run with this ds_config, else a row per key of this package.

    Raises:
        ConfigError: the file cannot be read or is not a JSON object.
    """
    ds_config = read_json(path)
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        pass  # base64
    except ValueError as error:
        value = f"{path} is Hjson, which DeepSpeed reads; strict JSON fails with: {error}"
        yield Row(
            "ds_config", value, "note", "remove comments and trailing commas for the HF Trainer, which reads JSON only"
        )
    if lines := problems(ds_config, num_ranks):
        yield from (Row("ds_config", line, "problem", f"change the key in {path}") for line in lines)
        return
    if not is_wanted(ds_config):
        nothing = f"{path} has no key of this package: DeepSpeed runs unchanged"
        yield Row("ds_config", nothing, "note", "add sequence_parallel_size, or an alst block")
        return
    config = parse(ds_config)
    P = config.sequence_parallel_size
    value = f"{path}: sequence parallelism is off"
    if P > 1:
        replicas = "" if num_ranks is None else f", {num_ranks // P} replica(s)"
        value = (
            f"{path}: {P} ranks per sequence{replicas}; sequences are padded to a multiple of "
            f"{config.padding_multiple()} tokens; gradients are summed in {config.seq_parallel_communication_data_type}"
        )
    yield Row("ds_config", value)
    values = config.alst.model_dump()
    yield from (Row(f"alst.{key}", shown(values[key])) for key in block_of(ds_config))
    offload = config.alst.activation_checkpoint_cpu_offload
    if offload and offload.nvme_path and not Path(offload.nvme_path).is_dir():
        missing = f"nvme_path={shown(offload.nvme_path)}: this host has no such folder"
        remedy = "create the folder on every host, or name another"
        yield Row("alst.activation_checkpoint_cpu_offload", missing, "problem", remedy)


def _probe(nvme_path: str) -> Iterator[Row]:
    """Yield the rows of probe.py, plus one if its process crashed or hung."""
    # -P keeps this folder and the current one out of sys.path, as for an installed program.
    command = [sys.executable, "-P", "-c", _PROGRAM, str(_ROOT), nvme_path]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line.removeprefix(ROW_MARK) for line in done.stdout.splitlines() if line.startswith(ROW_MARK)]
    found = [Row(*json.loads(line)) for line in lines]
    yield from found
    if done.returncode:
        where = f"after '{found[-1].name}'" if found else "at import torch, deepspeed"
        errors = [line for line in done.stderr.splitlines() if re.search("error|timeout", line, re.IGNORECASE)]
        value = f"failed {where} with exit status {done.returncode}: {errors[-1] if errors else 'no message'}"
        yield Row("a new process", value, "problem", "run: python -c 'import torch, deepspeed'")

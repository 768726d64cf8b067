"""Report rows on installed packages, their required versions and the autoload hook. Imports none of them."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deepspeed_alst.cli.rows import Row

_DISTRIBUTION = "deepspeed-alst"


class _Part(NamedTuple):
    """Distribution and the effect of its absence; ``without`` is empty if it is required."""

    name: str
    without: str = ""


_PARTS = (
    _Part("torch"),
    _Part("deepspeed"),
    _Part("transformers"),
    _Part("accelerate", "no HF Trainer, and no loading of a model in shards (ZeRO 3)"),
    _Part("triton", "no Triton kernels: torch computes, or the compiled ops where there are any"),
    _Part("liger-kernel", "no Liger kernels: this package's own take their place"),
    _Part("peft", "no LoRA"),
    _Part("trl", "no SFTTrainer"),
)
# DeepSpeed's ALST tutorial and ArcticTraining warn of its memory leak in torch.distributed.barrier.
_LEAKING_TORCH = ">=2.6.0,<=2.7.0"


def rows() -> Iterator[Row]:
    """Yield rows on Python, this package, its autoload hook and its dependencies."""
    requirements = _requirements()
    yield Row("python", f"{platform.python_version()} at {sys.executable}")
    yield _package_row()
    yield _entry_point_row()
    yield _autoload_row()
    for part in _PARTS:
        yield _part_row(part, requirements.get(part.name, ""))


def autoload_switch() -> str:
    """Return the environment setting that disables autoload at ``import torch``; empty if there is none."""
    for name in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "DEEPSPEED_ALST_AUTOLOAD"):
        if os.environ.get(name, "1") == "0":
            return f"{name}=0"
    return ""


def version_of(distribution: str) -> str:
    """Return the version of a distribution, or empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _requirements() -> dict[str, str]:
    """Return this package's version specifiers by distribution, extras included; empty if not installed."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {each.name: str(each.specifier) for each in parsed}


def _package_row() -> Row:
    version, folder = version_of(_DISTRIBUTION), Path(__file__).parent.parent
    if version:
        return Row("deepspeed_alst", f"{version} at {folder}")
    return Row("deepspeed_alst", f"not installed, at {folder}", "problem", f"pip install {folder.parent}")


def _entry_point_row() -> Row:
    found = importlib.metadata.entry_points(group="torch.backends", name="deepspeed_alst")
    if found:
        return Row("entry point", "torch.backends has deepspeed_alst: `import torch` loads it")
    return Row(
        "entry point",
        "torch.backends has no deepspeed_alst: the keys of a ds_config do nothing by themselves",
        "problem",
        "install the package, or import deepspeed_alst before deepspeed.initialize",
    )


def _autoload_row() -> Row:
    if switch := autoload_switch():
        return Row(
            "autoload",
            f"off by {switch}: the keys of a ds_config do nothing by themselves",
            "problem",
            f"unset {switch.partition('=')[0]}, or import deepspeed_alst before deepspeed.initialize",
        )
    return Row("autoload", "on")


def _part_row(part: _Part, wanted: str) -> Row:
    from packaging.specifiers import SpecifierSet

    found = version_of(part.name)
    bad = "note" if part.without else "problem"
    install = f"pip install '{part.name}{wanted}'"
    if not found:
        return Row(part.name, f"not installed: {part.without or 'no run without it'}", bad, install)
    if part.name == "torch" and SpecifierSet(_LEAKING_TORCH).contains(found, prereleases=True):
        return Row(
            part.name,
            f"{found}: torch.distributed.barrier of 2.6.0 to 2.7.0 takes more than 3 GiB of GPU memory and keeps it",
            "problem",
            install,
        )
    if wanted and not SpecifierSet(wanted).contains(found, prereleases=True):
        return Row(part.name, f"{found}, and this package asks for {wanted}", bad, install)
    return Row(part.name, f"{found} (asked for: {wanted})" if wanted else found)

"""Report rows on torch's build, the GPUs, the allocator setting and the attention kernels. Imports torch."""

import collections
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from deepspeed_alst.cli.packages import version_of
from deepspeed_alst.cli.rows import Row, in_short
from deepspeed_alst.engine.environment import allocator_variable
from deepspeed_alst.words import in_words

_DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST_CAPABILITY = (8, 0)
# Distribution and the module transformers imports, by the number in attn_implementation="flash_attention_<number>".
_FLASH = {
    2: ("flash-attn", "flash_attn"),
    3: ("flash-attn-3", "flash_attn_interface"),
    4: ("flash-attn-4", "flash_attn.cute"),
}


def device_rows() -> Iterator[Row]:
    """Yield rows on torch's build, the GPUs and the CUDA allocator setting."""
    driver = driver_version(_DRIVER)
    on_gpu = torch.cuda.is_available()
    yield build_row(torch.version.cuda, torch.version.hip, on_gpu, driver)
    if torch.distributed.is_nccl_available():
        yield Row("nccl", ".".join(str(part) for part in torch.cuda.nccl.version()))
    yield _accelerator_row(on_gpu)
    if on_gpu:
        yield from gpu_rows([torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())], driver)
    yield allocator_row(allocator_variable(os.environ), on_gpu)


def attention_rows() -> Iterator[Row]:
    """Yield rows on the attention kernels that attn_implementation can select in transformers."""
    on_gpu = torch.cuda.is_available()
    yield _sdpa_row(on_gpu)
    yield flash_row({number: _flash_version(*names) for number, names in _FLASH.items()}, on_gpu)
    yield Row("flex_attention", "torch's own" if on_gpu else "forward only: PyTorch has no backward of it on CPU")


def build_row(cuda: str | None, hip: str | None, on_gpu: bool, driver: str) -> Row:
    """Check that torch's build suits the machine.

    Args:
        cuda: CUDA version of torch's build.
        hip: ROCm version of torch's build.
        on_gpu: True if torch finds a GPU.
        driver: version of NVIDIA's driver; empty if there is none.
    """
    built = f"ROCm {hip}" if hip else f"CUDA {cuda}" if cuda else "CPU"
    value = f"built for {built}"
    if driver and not on_gpu:
        why = "and finds none of this machine's GPUs" if cuda else "and this machine has NVIDIA GPUs"
        remedy = (
            f"install a driver for CUDA {cuda}, and look for an empty CUDA_VISIBLE_DEVICES"
            if cuda
            else "install torch for CUDA"
        )
        return Row("torch build", f"{value}, {why} (driver {driver})", "problem", remedy)
    if (cuda or hip) and not on_gpu:
        return Row("torch build", f"{value}, and there is no GPU: a run is on CPU, over gloo", "note")
    return Row("torch build", value)


def gpu_rows(properties: Iterable[Any], driver: str) -> Iterator[Row]:
    """Yield one row per kind of GPU."""
    kinds = collections.Counter((each.name, each.total_memory, (each.major, each.minor)) for each in properties)
    for (name, total_bytes, capability), count in kinds.items():
        value = f"{count} x {name}, {in_words(total_bytes, 1)}, compute capability {capability[0]}.{capability[1]}"
        value += f", driver {driver}" if driver else ""
        if torch.version.hip is None and capability < _OLDEST_CAPABILITY:
            least = "older than 8.0: no flash attention, and the sum of gradient pieces runs in torch"
            yield Row("gpus", f"{value}; {least}", "note", "use GPUs of compute capability 8.0 or newer")
        else:
            yield Row("gpus", value)
    if len(kinds) > 1:
        yield Row("gpus", "of more than one kind: the smallest bounds the sequence", "note", "use GPUs of one kind")


def allocator_row(setting: str, on_gpu: bool) -> Row:
    """Return the row on the CUDA allocator setting.

    Args:
        setting: value of PYTORCH_CUDA_ALLOC_CONF and PYTORCH_ALLOC_CONF.
        on_gpu: True if torch finds a GPU.
    """
    if not on_gpu:
        return Row("allocator", "no CUDA device")
    if re.search(r"expandable_segments\s*:\s*false", setting, re.IGNORECASE):
        return Row(
            "allocator",
            f"{setting}: long sequences break the memory into pieces that fit nothing",
            "note",
            "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, or leave it to alst.expandable_segments",
        )
    return Row("allocator", setting or "unset: alst.expandable_segments switches expandable segments on")


def flash_row(versions: dict[int, str], on_gpu: bool) -> Row:
    """Return the row on flash attention packages by number: a version, an error's text, or empty."""
    value = ", ".join(f"{number}: {found or 'not installed'}" for number, found in versions.items())
    if any("Error" in found for found in versions.values()):
        return Row("flash attention", value, "problem", "build the package again, against this torch, or uninstall it")
    if on_gpu and not any(versions.values()):
        return Row("flash attention", value, "note", "pip install flash-attn --no-build-isolation; sdpa works without")
    return Row("flash attention", value if on_gpu else f"{value} (for GPUs)")


def driver_version(path: Path) -> str:
    """Return the version of NVIDIA's kernel driver, or empty if there is none."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", path.read_text(encoding="utf-8"))
    except OSError:
        return ""
    return found.group() if found else "of unknown version"


def _accelerator_row(on_gpu: bool) -> Row:
    accelerator = get_accelerator()
    value = f"{accelerator.device_name()}, over {accelerator.communication_backend_name()}"
    if on_gpu and accelerator.device_name() == "cpu":
        return Row("deepspeed runs on", f"{value}, though there is a GPU", "note", "unset DS_ACCELERATOR")
    return Row("deepspeed runs on", value)


def _sdpa_row(on_gpu: bool) -> Row:
    if not on_gpu:
        return Row("sdpa", f"torch {torch.__version__}, on CPU")
    backends = torch.backends.cuda
    kernels = {
        "flash": backends.is_flash_attention_available() and backends.flash_sdp_enabled(),
        "memory-efficient": backends.mem_efficient_sdp_enabled(),
        "cuDNN": backends.cudnn_sdp_enabled(),
    }
    found = [name for name, there in kernels.items() if there]
    if found:
        return Row("sdpa", f"torch {torch.__version__}: {', '.join(found)}")
    return Row("sdpa", "only the one that makes every score", "problem", "install a torch with flash attention")


def _flash_version(distribution: str, module: str) -> str:
    """Return a package's version, with its import error if any; empty if it is not installed."""
    version = version_of(distribution)
    if not version:
        return ""
    try:
        importlib.import_module(module)
    except Exception as error:  # usually built against another torch
        return f"{version}, which does not load ({in_short(error)})"
    return version

"""Rows of ``ds_alst report`` that need torch and DeepSpeed, printed by a process of its own."""

import functools
import importlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from deepspeed_alst.cli.report import ROW_MARK, Row, guarded, judged, version_of
from deepspeed_alst.environment import check_deepspeed, is_left_over
from deepspeed_alst.formatting import format_bytes
from deepspeed_alst.kernels import builder
from deepspeed_alst.offload.budget import available_bytes
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.host_buffers import HostBufferPool

_DRIVER = Path("/proc/driver/nvidia/version")
# Distribution of each module that a run or its kernels import.
_MODULES = {
    "deepspeed_alst.initialize": "deepspeed",
    "triton": "triton",
    "liger_kernel.ops": "liger-kernel",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "flash_attn.cute": "flash-attn-4",
}
_DISK_BYTES, _PIECES = 256 << 20, 4
_SILENCE_SECONDS = 30.0


def main(hooked: bool, nvme_path: str) -> None:
    """Print all rows; ``hooked`` is True if ``import torch, deepspeed`` has loaded this package."""
    parts = {
        "autoload": autoload_rows(hooked),
        "tested versions": tested_rows(),
        "gpus": gpu_rows(),
        "imports": import_rows(),
        "ops": op_rows(),
        "build locks": lock_rows(),
        "host memory": memory_rows(),
        "disk": disk_rows(nvme_path) if nvme_path else (),
    }
    for name, rows in parts.items():
        for row in guarded(name, rows):
            print(f"\n{ROW_MARK}{json.dumps(row)}", flush=True)


def autoload_rows(hooked: bool) -> Iterator[Row]:
    """Yield the row on the hook that ``import torch`` installs in a program that does not import this package."""
    if hooked:
        yield Row("autoload", f"on: `import torch` loads {Path(__file__).parents[1]}")
        return
    names = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "DEEPSPEED_ALST_AUTOLOAD")
    switch = next((name for name in names if os.environ.get(name) == "0"), "")
    why = f"off ({switch}=0)" if switch else "`import torch, deepspeed` does not load it"
    remedy = f"unset {switch}" if switch else "install the package"
    value = f"{why}: the keys of a ds_config have no effect"
    yield Row("autoload", value, "problem", f"{remedy}, or import deepspeed_alst before deepspeed.initialize")


def tested_rows() -> Iterator[Row]:
    """Yield the row on libraries newer than the tested versions."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_deepspeed()
    newer = "; ".join(str(each.message) for each in caught)
    yield judged("tested versions", "DeepSpeed is tested", newer, "compare a run with ds_alst verify")


def gpu_rows() -> Iterator[Row]:
    """Yield the row on the GPUs."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = Counter(f"{p.name}, {format_bytes(p.total_memory, 1)}, capability {p.major}.{p.minor}" for p in found)
    value = "; ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "none"
    device = get_accelerator().device_name()
    value += f"; torch {torch.__version__}, DeepSpeed runs on {device}"
    if _DRIVER.exists() and not found:
        remedy = "install torch for CUDA, or a driver for its CUDA version; check CUDA_VISIBLE_DEVICES"
        yield Row("gpus", f"{value}, although an NVIDIA driver is installed", "problem", remedy)
    else:
        yield judged("gpus", value, "not on the GPUs" if found and device == "cpu" else "", "unset DS_ACCELERATOR")


def import_rows() -> Iterator[Row]:
    """Yield a row per module that a run may import, with the error if an installed one does not load."""

    def imported(module: str, version: str) -> Iterator[Row]:
        if version:
            importlib.import_module(module)
        yield Row(f"import {module}", "loads" if version else "not installed")

    for module, distribution in _MODULES.items():
        yield from guarded(f"import {module}", imported(module, version_of(distribution)))


def op_rows() -> Iterator[Row]:
    """Yield the row on the csrc/ op of this device; nothing is built."""
    device = get_accelerator().device_name()
    if device not in builder.LIBRARIES:
        return
    name, found = f"op {builder.LIBRARIES[device]}", builder.load_existing(device)
    problem = builder.missing_requirement(device)
    if problem and not found:
        yield Row(name, f"{problem}: torch computes instead, slower", "note", problem.fix)
    else:
        yield Row(name, str(found or "not built yet; the first use builds it, in 10 s on CPU and a minute for CUDA"))


def lock_rows() -> Iterator[Row]:
    """Yield a row per lock that a killed build has left in torch's extensions folder: it blocks the next build."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    # Builds of this package (alst_*) tolerate a stale lock.
    locks = [lock for lock in {*root.glob("*/lock"), *root.glob("*/*/lock")} if "/alst_" not in str(lock)]
    stale = sorted(filter(is_left_over, locks))
    for lock in stale:
        value = f"{lock} is left over from a build that was killed: the next build of this op waits forever"
        yield Row("build lock", value, "problem", f"if no host that shares the folder is building: rm {lock}")
    if not stale:
        yield Row("build locks", f"none left over in {root}")


def memory_rows() -> Iterator[Row]:
    """Yield the row on host memory and the part of it available to offloaded activations."""
    memory, spare = psutil.virtual_memory(), available_bytes()
    value = f"{format_bytes(memory.total, 1)}, {format_bytes(memory.available, 1)} available, "
    value += f"{format_bytes(spare, 1)} of it for offloaded activations (cgroup limit included)"
    yield judged("host memory", value, "" if spare else "none", "free host memory, or raise the container's limit")


def disk_rows(folder: str) -> Iterator[Row]:
    """Measure a folder's disk with the disk tier's own transfers to a temporary file.

    Raises:
        AlstError: the folder is not writable, its disk has less than 256 MiB free, or it does not respond.
    """
    disk = DiskFile(folder, silence_seconds=_SILENCE_SECONDS)
    try:
        disk.reserve(_DISK_BYTES)
        pool, size = HostBufferPool(), _DISK_BYTES // _PIECES
        slots = [(pool.acquire(size).random_(), disk.allocate(size)) for _ in range(_PIECES)]
        begin = time.perf_counter()
        writes = [disk.threads.submit(functools.partial(disk.write, *slot)) for slot in slots]
        written = [disk.threads.wait(each) for each in writes]
        middle = time.perf_counter()
        checked = [(*slot, checksum) for slot, checksum in zip(slots, written, strict=True)]
        reads = [disk.threads.submit(functools.partial(disk.read, *each)) for each in checked]
        for each in reads:
            disk.threads.wait(each)
        rates = [_DISK_BYTES / 1e6 / seconds for seconds in (middle - begin, time.perf_counter() - middle)]
        value = f"writes {rates[0]:,.0f} MB/s, reads {rates[1]:,.0f} MB/s; {disk.description}"
        problem = "not a disk" if "in memory" in disk.description else ""
        yield judged("disk", value, problem, "name a folder on a disk, best a local NVMe drive", "problem")
    finally:
        disk.close()

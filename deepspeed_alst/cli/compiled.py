"""Report rows on compiled ops, stale build locks, host memory and disks. Imports torch."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from deepspeed_alst.cli.rows import Row
from deepspeed_alst.engine.environment import is_left_over
from deepspeed_alst.offload.disk import DiskFile
from deepspeed_alst.offload.memory import cgroup_bytes, spare_bytes
from deepspeed_alst.ops.aio import is_aio_there, why_not_aio
from deepspeed_alst.ops.builder import BUILDERS
from deepspeed_alst.words import in_words

# Pieces have the disk tier's size and are all in flight at once.
_DISK_BYTES, _PIECES = 256 << 20, 4
_SILENCE_SECONDS = 30.0
# 8 ranks per host, 4 handles per rank, 2 queues per handle, 32 requests per queue.
_AIO_REQUESTS = 8 * 4 * 2 * 32


def op_rows() -> Iterator[Row]:
    """Yield rows on the csrc/ ops of this device and the DeepSpeed ops that runs use; nothing is built."""
    device = get_accelerator().device_name()
    for (library, kind), builder_class in BUILDERS.items():
        if kind != device:
            continue
        builder = builder_class()
        if found := builder.find():
            yield Row(f"op {library}", f"for {device}: {found}")
        elif problem := builder.why_not():
            yield Row(
                f"op {library}",
                f"{problem}: torch takes its place, slower and with the same result",
                "note",
                problem.way_out,
            )
        else:
            yield Row(f"op {library}", "not built yet: at its first use, in 10 s on CPU and a minute for CUDA")
    if device == "cpu":
        # torch builds into one folder per kind of torch, or into TORCH_EXTENSIONS_DIR.
        name = "deepspeed_shm_comm/deepspeed_shm_comm.so"
        root = _extensions_folder()
        built = any((folder / name).exists() for folder in (root, *root.glob("*")))
        later = "not built yet: DeepSpeed builds it when the ranks first meet, in 1 to 2 minutes without a word"
        yield Row("op deepspeed_shm_comm", "built" if built else later)


def aio_rows() -> Iterator[Row]:
    """Yield the row on DeepSpeed's async I/O op, which the disk tier uses if it is available."""
    name, otherwise = "op async_io", "the disk tier does its transfers by system calls in threads"
    if not is_aio_there():
        problem = why_not_aio()
        if problem is not None:
            yield Row(name, f"{problem}: {otherwise}", "note", problem.way_out)
            return
    left = _free_aio_requests()
    if left is not None and left < _AIO_REQUESTS:
        yield Row(name, f"the kernel has {left} requests left: {otherwise}", "note", "raise fs.aio-max-nr with sysctl")
        return
    yield Row(name, "there" if is_aio_there() else "not built yet: at the disk tier's first use, in a minute")


def lock_rows() -> Iterator[Row]:
    """Yield rows on build locks in torch's extensions folder. After a killed build, its lock blocks the next one."""
    root = _extensions_folder()
    # Builds of this package (alst_*) tolerate a stale lock.
    locks = [lock for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}) if "/alst_" not in str(lock)]
    found = False
    for lock in locks:
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except FileNotFoundError:  # released meanwhile
            continue
        found = True
        if is_left_over(lock):
            yield Row(
                "build lock",
                f"{lock}, {minutes:.0f} minutes old, held by no process here: whoever needs this op waits for ever",
                "problem",
                f"when no build runs, on other hosts that share the folder either: rm {lock}",
            )
        else:
            yield Row("build lock", f"{lock}, {minutes:.0f} minutes old: a build is running")
    if not found:
        yield Row("build locks", f"none in {root}")


def memory_rows() -> Iterator[Row]:
    """Yield the row on host memory and the part of it available to offloaded activations."""
    memory, limit, spare = psutil.virtual_memory(), cgroup_bytes(), spare_bytes()
    value = f"{in_words(memory.total, 1)}, {in_words(memory.available, 1)} available"
    if limit < memory.available:
        value += f"; the cgroup leaves {in_words(limit, 1)}"
    value += f"; {in_words(spare, 1)} for offloaded activations"
    if spare == 0:
        yield Row("host memory", value, "note", "end what holds it, or raise the container's limit")
    else:
        yield Row("host memory", value)


def disk_rows(folder: str) -> Iterator[Row]:
    """Measure a folder's disk with the disk tier's own transfers to a temporary file.

    Raises:
        AlstError: the folder is not writable, its disk has less than 256 MiB free, or it does not respond.
    """
    # "auto" would build the op now.
    disk = DiskFile(folder, "auto" if is_aio_there() else "threads", silence_seconds=_SILENCE_SECONDS)
    try:
        disk.reserve(_DISK_BYTES)
        buffers = [disk.new_buffer(_DISK_BYTES // _PIECES).random_() for _ in range(_PIECES)]
        offsets = [disk.allocate(buffer.numel()) for buffer in buffers]
        write = _rate([lambda b=b, o=o: disk.write(b, o) for b, o in zip(buffers, offsets, strict=True)])
        read = _rate([lambda b=b, o=o: disk.read(b, o) for b, o in zip(buffers, offsets, strict=True)])
        how = disk.description.replace(" (as asked for)", "")
        value = f"writes {write:,.0f} MB/s, reads {read:,.0f} MB/s; {how}"
        if disk.warning:
            yield Row("disk", f"{value}; {disk.warning}", "problem", "name a folder on a disk, best a local NVMe drive")
        else:
            yield Row("disk", value)
    finally:
        disk.close()


def _rate(transfers: list) -> float:
    """Return the rate of concurrent transfers in MB/s."""
    begin = time.perf_counter()
    for transfer in [start() for start in transfers]:
        transfer.wait()
    return _DISK_BYTES / 1e6 / (time.perf_counter() - begin)


def _extensions_folder() -> Path:
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())


def _free_aio_requests() -> int | None:
    """Return the number of async I/O requests the kernel still accepts, or None if unknown."""
    try:
        taken, most = (int(Path("/proc/sys/fs", name).read_text()) for name in ("aio-nr", "aio-max-nr"))
    except (OSError, ValueError):
        return None
    return most - taken

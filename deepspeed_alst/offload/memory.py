"""Host memory available for activations, within the limits of the cgroup."""

import os
import re
from pathlib import Path

import psutil
import torch.distributed as dist

# Reserved for other processes, useful page cache, and later allocations of torch and the libraries.
_RESERVED_SHARE = 20
_LEAST_RESERVED = 2**30

_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

# torchrun and accelerate, DeepSpeed's launcher, Open MPI, MPICH and Intel MPI.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def spare_bytes() -> int:
    """Return the bytes available to this host's processes, minus a reserve of 1/20 and at least 1 GiB."""
    available = min(psutil.virtual_memory().available, cgroup_bytes())
    return max(0, available - max(_LEAST_RESERVED, available // _RESERVED_SHARE))


def ranks_on_host() -> int:
    """Return the number of ranks on this host from the launcher, MPI or SLURM's ``srun``; else the world size."""
    for name in _LOCAL_SIZES:
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    by_host = _slurm_tasks(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = os.environ.get("SLURM_NODEID", "")
    # If the counts differ, srun started a launcher that started the ranks.
    if sum(by_host) == world_size and node.isdigit() and int(node) < len(by_host):
        return by_host[int(node)]
    return world_size


def _slurm_tasks(compressed: str) -> list[int]:
    """Parse the tasks per host: ``"8(x2),4"`` is 8, 8, 4 (SLURM_TASKS_PER_NODE in the sbatch manual page)."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", compressed)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def cgroup_bytes(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes left in this process's cgroups, outer ones included; 2**63 - 1 without limits."""
    least = 2**63 - 1
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return least
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        inner = base / path.lstrip("/")
        # Inside a container the path may be the host's, and the limit is at the visible root.
        for folder in (inner, *inner.parents):
            least = min(least, _left_in(folder))
            if folder == base:
                break
    return least


def _left_in(folder: Path) -> int:
    for limit_name, usage_name, cache_name in _CGROUP_FILES:
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit != "max":
            # Inactive cache is reclaimed before the limit applies.
            return max(0, int(limit) - usage + int(stat.get(cache_name, 0)))
    return 2**63 - 1

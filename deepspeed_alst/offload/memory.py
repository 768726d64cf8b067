"""What the host has to spare for activations: the memory that is available, within the limits of the cgroup."""

import os
import re
from pathlib import Path

import psutil
import torch.distributed as dist

# Left alone: other processes, page cache that is worth keeping, and what torch and the libraries still take.
_RESERVED_SHARE = 20
_LEAST_RESERVED = 2**30

_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)

# torchrun and accelerate, DeepSpeed's launcher, Open MPI, MPICH and Intel MPI.
_LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def spare_bytes() -> int:
    """Bytes that this host's processes may still take, less a twentieth and less a GiB at least."""
    available = min(psutil.virtual_memory().available, cgroup_bytes())
    return max(0, available - max(_LEAST_RESERVED, available // _RESERVED_SHARE))


def ranks_on_host() -> int:
    """How many ranks share the host's memory, as the launcher, MPI or SLURM's ``srun`` says it; else all there are."""
    for name in _LOCAL_SIZES:
        if os.environ.get(name, "").isdigit():
            return max(1, int(os.environ[name]))
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    by_host = _slurm_tasks(os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = os.environ.get("SLURM_NODEID", "")
    # Other counts: srun started something that started the ranks.
    if sum(by_host) == world_size and node.isdigit() and int(node) < len(by_host):
        return by_host[int(node)]
    return world_size


def _slurm_tasks(compressed: str) -> list[int]:
    """Tasks of each host; ``"8(x2),4"`` is 8, 8, 4. Source: SLURM_TASKS_PER_NODE in the manual page of sbatch."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", compressed)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def cgroup_bytes(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the cgroups of this process, the outer ones included, leave it; without limits 2**63 - 1."""
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
        # Inside a container the path may be the host's, and the limit stands at the root that one sees.
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
            # Cache that is not in use goes before the limit strikes.
            return max(0, int(limit) - usage + int(stat.get(cache_name, 0)))
    return 2**63 - 1

"""Checks of the machine before DeepSpeed starts."""

import contextlib
import os
import time
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from packaging.version import Version
from torch.utils import cpp_extension

from deepspeed_alst.config.schema import AlstConfig
from deepspeed_alst.errors import ConfigError, SetupError

_TESTED = ((0, 19, 8), (0, 20))
# Newest minor version of each further dependency that `make canary` has passed with: docs/versions.md.
NEWEST_TESTED = {
    "torch": "2.14",
    "transformers": "5.24",
    "accelerate": "1.15",
    "trl": "1.16",
    "peft": "0.21",
    "liger-kernel": "0.8",
    "triton": "3.9",
}
# Another host's build in a shared home has no open file here; no build of this op takes this long.
_REMOTE_BUILD_SECONDS = 600
_LOOKS, _LOOK_SECONDS = 5, 0.3


def check_deepspeed() -> None:
    """Raise SetupError for an untested DeepSpeed; warn on rank 0 about other libraries newer than tested."""
    if not _TESTED[0] <= Version(deepspeed.__version__).release < _TESTED[1]:
        raise SetupError(
            f"deepspeed {deepspeed.__version__} is not tested with this version of deepspeed_alst, which patches its "
            "internals. Install a tested one: pip install 'deepspeed>=0.19.8,<0.20'"
        )
    newer = []
    for name, newest in NEWEST_TESTED.items():
        with contextlib.suppress(PackageNotFoundError):
            found = version(name)
            if Version(found).release[:2] > Version(newest).release:
                newer.append(f"{name} {found} (newest tested: {newest})")
    if newer and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"newer than tested with this version of deepspeed_alst: {', '.join(newer)}; see docs/versions.md",
            stacklevel=2,
        )


def check_build_lock() -> None:
    """Raise SetupError if a killed build has left its lock file behind.

    On CPU, DeepSpeed compiles its shared-memory op at the first ``init_distributed``, under a lock file. A killed run
    leaves the file behind, and every later run waits for it forever, without a message.
    """
    if get_accelerator().device_name() != "cpu" or torch.distributed.is_initialized():
        return
    lock = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)) / "lock"
    if is_left_over(lock):
        raise SetupError(
            f"{lock} is left over from a build that was killed, and DeepSpeed would wait for it forever. "
            f"Remove it: rm {lock}"
        )


def is_left_over(lock: Path) -> bool:
    """Return True if a torch lock file persists for a second while no process of this host has it open.

    With several hosts, which may share the folder, a recent lock file counts as another host's build. From torch 2.14
    on, the file stays after every build and blocks none: the operating system releases the lock with its holder.
    """
    if not hasattr(cpp_extension, "FileBaton"):
        return False
    several_hosts = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE")) != os.environ.get("WORLD_SIZE")
    # A builder closes the file shortly before it removes it, so only a persistent lock file is stale.
    for _ in range(_LOOKS):
        try:
            age = time.time() - lock.stat().st_mtime
        except OSError:
            return False
        if _is_open(lock) or (several_hosts and age < _REMOTE_BUILD_SECONDS):
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def _is_open(path: Path) -> bool:
    path = path.resolve()  # /proc has resolved paths, and a home may be a symlink
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if descriptor.readlink() == path:
                return True
    return False


def use_expandable_segments(config: AlstConfig) -> str:
    """Enable expandable segments before the first CUDA allocation, or raise ConfigError; return a report row."""
    wanted = config.alst.expandable_segments
    if not torch.cuda.is_available():
        if wanted:
            raise ConfigError("alst.expandable_segments=true: this machine has no CUDA device. Remove the key.")
        return ""
    if wanted is False:
        return "expandable segments unchanged: alst.expandable_segments is false"
    if "expandable_segments" in allocator_variable(os.environ):
        return f"expandable segments as in the environment: {allocator_variable(os.environ)}"
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 0:
        late = (
            "the program has allocated CUDA memory before deepspeed.initialize; export "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before it starts"
        )
        if wanted:
            raise ConfigError(f"alst.expandable_segments=true: too late, {late}.")
        return f"expandable segments off: {late}"
    # torch resets settings that a call does not repeat.
    given = allocator_variable(os.environ)
    torch._C._accelerator_setAllocatorSettings(",".join(filter(None, [given, "expandable_segments:True"])))
    return f"expandable segments on{given and f', beside {given}'}"


def allocator_variable(environ: Mapping[str, str]) -> str:
    """Return the allocator settings of the environment, from both of torch's variables."""
    return ",".join(filter(None, map(environ.get, ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))))

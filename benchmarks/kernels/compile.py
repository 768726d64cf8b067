"""Compile every kernel for GPUs that are not present, by its own launch wrapper, on meta tensors.

    python -m benchmarks.kernels.compile [target ...]

prints a line of JSON per kernel. It needs TRITON_INTERPRET unset, and a separate process, since it replaces the driver
permanently. Kernels are compiled only, not run.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.judge import subjects
from benchmarks.ranks import finished

_KIB = 1024
_SECONDS = 1800.0  # a few minutes on an idle machine
# Limit of shared memory per block in bytes.
SHARED = {"sm_80": 163 * _KIB, "sm_90": 227 * _KIB, "sm_100": 227 * _KIB, "gfx942": 64 * _KIB}


@dataclass(frozen=True)
class Compiled:
    """Resources of one kernel on one chip."""

    kernel: str
    target: str
    size: str
    registers: int
    shared: int
    spilled: int
    """Bytes on NVIDIA, registers on AMD."""
    accesses: str = ""
    """NVIDIA only: global memory accesses and barriers, in code order."""

    @property
    def fits(self) -> bool:
        """True without spills and within the chip's shared memory."""
        return self.spilled == 0 and self.shared <= SHARED[self.target]


def compile_all(targets: tuple[str, ...] = tuple(SHARED)) -> list[Compiled]:
    """Compile every kernel for these targets, in a separate process without a cache.

    Raises:
        RuntimeError: compilation fails.
        TimeoutError: the machine is too busy.
    """
    with tempfile.TemporaryDirectory(prefix="triton_") as folder:
        # PTXAS_OPTIONS is read on import of triton.
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PTXAS_OPTIONS")},
            **{"TRITON_CACHE_DIR": folder, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_DEFAULT_FP_FUSION": "1"},
        }
        done = finished([sys.executable, "-m", __name__, *targets], _SECONDS, env=environment, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:] or done.stdout[-4000:])
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]


def _compile(target: str) -> Iterator[Compiled]:
    logs: dict[str, str] = {}
    for subject in subjects():
        for size, case in subject.COMPILED:
            with _recording(target) as found:
                subject.launch(*case)
            for name, kernel, log in found:
                # Cases that share a kernel compile it once.
                registers, spilled = _resources(kernel, logs.setdefault(kernel.hash, log))
                accesses = " ".join(re.findall(r"\b(?:ld|st)\.global[\w.]*|\bbar\.sync", kernel.asm.get("ptx", "")))
                yield Compiled(name, target, size, registers, kernel.metadata.shared, spilled, accesses)


def _resources(kernel: Any, log: str) -> tuple[int, int]:
    """Parse registers and spills from the assembler's output."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        (registers,) = re.findall(r"\.vgpr_count:\s*(\d+)", text)
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)
    else:
        (registers,) = re.findall(r"Used (\d+) registers", log)
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert len(spilled) == 2, f"the assembler's words have changed:\n{log}"
    return int(registers), sum(int(each) for each in spilled)


@contextlib.contextmanager
def _recording(target: str) -> Iterator[list[tuple[str, Any, str]]]:
    """Compile without launching; yield a list of names, kernels and assembler output."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(_driver(target))
    run, found = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        words = io.StringIO()
        with contextlib.redirect_stdout(words):
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__.strip("_"), kernel, words.getvalue()))
        return kernel

    JITFunction.run = compile_only
    try:
        yield found
    finally:
        JITFunction.run = run


def _driver(target: str) -> Any:
    """Create a driver for a GPU that is not present."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    is_nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if is_nvidia else GPUTarget("hip", target, 64)

    class Absent(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> GPUTarget:
            return gpu

        def get_current_device(self) -> Any:
            return gpu.arch  # key of the kernel cache per target

        def get_current_stream(self, device: Any) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("nothing is timed here")

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

    return Absent()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for each in _compile(name):
            print(json.dumps(dataclasses.asdict(each)), flush=True)

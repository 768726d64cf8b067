"""Build and load csrc/'s op: prebuilt at installation (``DS_BUILD_ALST=1``), else built at first use.

A build runs in a folder of its own under a lock that the kernel releases with its holder, and its library moves into
place when complete. So a killed build cannot break or block a later one, which torch's own lock file would.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder.builder import assert_no_cuda_mismatch
from torch.utils import cpp_extension

LIBRARIES = {"cpu": "alst_sum_pieces", "cuda": "alst_sum_pieces_cuda"}
"""Name of the library of ``deepspeed_alst::sum_pieces`` by device; CUDA's has no CPU kernel."""
_PACKAGE = Path(__file__).resolve().parent.parent
# Oldest torch whose stable ABI has all that the sources use; the binaries run on it and on every later one.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Fused multiply-adds would round once where the reference rounds twice.
_CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-ffp-contract=off", _TORCH_TARGET]
_ARCHITECTURES = (80, 90, 100)


class OpBuildError(RuntimeError):
    """Error of an op that cannot be built or loaded here, with a fix in ``way_out``."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(reason)
        self.way_out = way_out


def source_folder() -> Path:
    """Return the folder of the C++ sources: inside an installed package, next to the one of a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def _source(device: str) -> str:
    return str(source_folder() / ("sum_pieces.cu" if device == "cuda" else "sum_pieces.cpp"))


def extension(device: str) -> Any:
    """Return the setuptools extension that builds a device's library at installation."""
    kind = cpp_extension.CppExtension if device == "cpu" else cpp_extension.CUDAExtension
    flags = {"cxx": _CXX_FLAGS, "nvcc": _nvcc_flags(device)}
    return kind(f"deepspeed_alst.kernels.{LIBRARIES[device]}_op", [_source(device)], extra_compile_args=flags)


def cuda_flags(nvcc: str) -> list[str]:
    """Return nvcc's flags: each of our architectures that it supports, and PTX for newer ones."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in _ARCHITECTURES if f"compute_{each}" in known]
    oldest = f"compute_{_ARCHITECTURES[0]}"
    # USE_CUDA declares the stable ABI's CUDA streams.
    return ["-O3", "-std=c++20", "-DUSE_CUDA", _TORCH_TARGET, *targets, f"-gencode=arch={oldest},code={oldest}"]


def _nvcc_flags(device: str) -> list[str]:
    return cuda_flags(f"{cpp_extension.CUDA_HOME}/bin/nvcc") if device == "cuda" else []


def why_not(device: str) -> OpBuildError | None:
    """Return an error that names the unsupported device or the missing build dependency, or None."""
    if device == "cuda":
        if problem := _unsupported():
            return problem
        if cpp_extension.CUDA_HOME is None:
            return OpBuildError("no CUDA toolkit found", "install one and name its folder in CUDA_HOME")
        try:
            assert_no_cuda_mismatch(LIBRARIES[device])
        except Exception as error:  # DeepSpeed raises plain Exceptions
            return OpBuildError(str(error), "install the CUDA toolkit that torch was built with")
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None:
        way_out = "install g++, or name a compiler in CXX, or install with DS_BUILD_ALST=1 where there is one"
        return OpBuildError(f"no C++ compiler found ({compiler})", way_out)
    if not cpp_extension.is_ninja_available():
        return OpBuildError("no ninja found", "pip install ninja, and have its folder in PATH")
    return None


def _unsupported() -> OpBuildError | None:
    if not torch.cuda.is_available():
        return OpBuildError("torch finds no CUDA device here", "run on a machine that has one")
    major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if 10 * major + minor < _ARCHITECTURES[0]:
        return OpBuildError(f"compute capability {major}.{minor}", "it is compiled for 8.0 and newer")
    return None


def find(device: str) -> Path | None:
    """Load the library that is there, prebuilt or built before, and return its path; None if none loads."""
    if device == "cuda" and _unsupported():
        return None
    for library in (*_PACKAGE.glob(f"kernels/{LIBRARIES[device]}_op.*so"), *_build_folder(device).glob("*.so")):
        with contextlib.suppress(OSError):  # for another libc, or of an interrupted copy
            torch.ops.load_library(library)
            return library
    return None


def find_or_build(device: str) -> Path:
    """Load the library that is there, else build it, in the first process of this host that needs it.

    Raises:
        OpBuildError: a dependency is missing, the folder is not writable, or the compiler failed.
    """
    if library := find(device):
        return library
    if problem := why_not(device):
        raise problem
    folder = _build_folder(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "builder").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return find(device) or _build(device, folder)
    except OSError as error:
        reason = f"cannot build in {folder}: {error.strerror or error}"
        raise OpBuildError(reason, "name a folder in TORCH_EXTENSIONS_DIR") from error


def _build_folder(device: str) -> Path:
    """Return the folder of builds of exactly these sources and flags, not shared by package versions."""
    inputs = hashlib.sha256(str(torch.version.cuda).encode())
    for source in (Path(__file__), *sorted(source_folder().glob("*.[ch]*"))):
        inputs.update(source.name.encode() + source.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / LIBRARIES[device] / inputs.hexdigest()[:16]


def _build(device: str, folder: Path) -> Path:
    for left in folder.glob("build-*"):  # by killed builders
        shutil.rmtree(left, ignore_errors=True)
    name = LIBRARIES[device]
    print(f"deepspeed_alst: compiling {name} into {folder}, once; up to a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as workplace:
        flags = _CXX_FLAGS, _nvcc_flags(device)
        try:
            cpp_extension.load(name, _source(device), *flags, build_directory=workplace, is_python_module=False)
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
            log = folder / "failed.log"
            log.write_text(str(error), encoding="utf-8")
            lines = [line.strip() for line in str(error).splitlines()[1:] if "error" in line.lower()]
            raise OpBuildError((lines or [str(error)])[0], f"the whole output is in {log}") from error
        (library,) = Path(workplace).glob("*.so")
        return library.replace(folder / library.name)


@functools.cache
def load(device: str) -> str:
    """Load the compiled op for ``"cpu"`` or ``"cuda"`` once per process; return which one will compute.

    Without it torch computes with the same result, and a warning gives the reason and a fix.

    Returns:
        ``"csrc op"``, or ``"torch (<why>)"``.
    """
    if device not in LIBRARIES:
        return f"torch (no csrc op for {device})"
    try:
        find_or_build(device)
    except Exception as error:  # compilers raise many types; training can go on
        reason = str(error) if isinstance(error, OpBuildError) else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"deepspeed_alst: sum_pieces on {device} runs in torch, slower and with the same result: {reason}. "
            f"Way out: {getattr(error, 'way_out', 'see the messages above')}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"torch ({reason.splitlines()[0]})"
    return "csrc op"

"""Build and load csrc/'s op: prebuilt at installation (``DS_BUILD_ALST=1``), else built at first use.

A build runs in its own folder under a file lock that the operating system releases when the process ends, and the
finished library is moved into place. So a killed build cannot break or block a later one, as torch's lock file would.
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

LIBRARIES = {"cpu": "alst_ops", "cuda": "alst_ops_cuda"}
"""Name of the library of a device's kernels; CUDA's has no CPU kernels."""
_SOURCES = {"cpu": "sum_pieces.cpp", "cuda": "sum_pieces.cu"}
_PACKAGE = Path(__file__).resolve().parent.parent
# Oldest torch with the stable ABI that the sources need; the binaries run on it and on every later one.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# No fused multiply-adds, which round once where the reference rounds twice.
_CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-ffp-contract=off", _TORCH_TARGET]
_ARCHITECTURES = (80, 90, 100)


class OpBuildError(RuntimeError):
    """An op that cannot be built or loaded, with the remedy in ``fix``."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


def source_folder() -> Path:
    """Return the folder of the C++ sources: inside an installed package, next to the package in a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


def _sources(device: str) -> list[str]:
    return [str(source_folder() / _SOURCES[device])]


def extension(device: str) -> Any:
    """Return the setuptools extension that builds a device's library at installation."""
    kind = cpp_extension.CppExtension if device == "cpu" else cpp_extension.CUDAExtension
    flags = {"cxx": _CXX_FLAGS, "nvcc": _nvcc_flags(device)}
    return kind(f"deepspeed_alst.kernels.{LIBRARIES[device]}", _sources(device), extra_compile_args=flags)


def cuda_flags(nvcc: str) -> list[str]:
    """Return nvcc's flags: each architecture that it supports, and PTX for newer ones."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in _ARCHITECTURES if f"compute_{each}" in known]
    oldest = f"compute_{_ARCHITECTURES[0]}"
    # USE_CUDA enables the stable ABI's CUDA streams.
    return ["-O3", "-std=c++20", "-DUSE_CUDA", _TORCH_TARGET, *targets, f"-gencode=arch={oldest},code={oldest}"]


def _nvcc_flags(device: str) -> list[str]:
    return cuda_flags(f"{cpp_extension.CUDA_HOME}/bin/nvcc") if device == "cuda" else []


def missing_requirement(device: str) -> OpBuildError | None:
    """Return an error for an unsupported GPU or a missing build dependency; None if the op can be built."""
    if device == "cuda":
        if problem := _unsupported_gpu():
            return problem
        if cpp_extension.CUDA_HOME is None:
            return OpBuildError("no CUDA toolkit found", "install one and set CUDA_HOME to its folder")
        try:
            assert_no_cuda_mismatch(LIBRARIES[device])
        except Exception as error:  # DeepSpeed raises plain Exceptions
            return OpBuildError(str(error), "install the CUDA toolkit that torch was built with")
    compiler = cpp_extension.get_cxx_compiler().split()[0]
    if shutil.which(compiler) is None:
        fix = "install g++, set CXX to a compiler, or install the package with DS_BUILD_ALST=1 where there is one"
        return OpBuildError(f"no C++ compiler found ({compiler})", fix)
    if not cpp_extension.is_ninja_available():
        return OpBuildError("ninja not found", "pip install ninja, and add its folder to PATH")
    return None


def _unsupported_gpu() -> OpBuildError | None:
    if not torch.cuda.is_available():
        return OpBuildError("torch finds no CUDA device", "run on a machine with an NVIDIA GPU")
    major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if 10 * major + minor < _ARCHITECTURES[0]:
        return OpBuildError(f"compute capability {major}.{minor} is not supported", "use a GPU with 8.0 or newer")
    return None


def load_existing(device: str) -> Path | None:
    """Load a library that was built earlier or at installation and return its path; None if none loads."""
    if device == "cuda" and _unsupported_gpu():
        return None
    for library in (*_PACKAGE.glob(f"kernels/{LIBRARIES[device]}.*so"), *_build_folder(device).glob("*.so")):
        with contextlib.suppress(OSError):  # for another libc, or of an interrupted copy
            torch.ops.load_library(library)
            return library
    return None


def load_or_build(device: str) -> Path:
    """Load an existing library, else build it in the first process of this host that needs it.

    Raises:
        OpBuildError: a dependency is missing, the folder is not writable, or the compiler failed.
    """
    if library := load_existing(device):
        return library
    if problem := missing_requirement(device):
        raise problem
    folder = _build_folder(device)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "builder").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return load_existing(device) or _build(device, folder)
    except OSError as error:
        reason = f"cannot build in {folder}: {error.strerror or error}"
        raise OpBuildError(reason, "set TORCH_EXTENSIONS_DIR to a writable folder") from error


def _build_folder(device: str) -> Path:
    """Return the build folder for exactly these sources and flags."""
    inputs = hashlib.sha256(str(torch.version.cuda).encode())
    for source in (Path(__file__), *sorted(source_folder().glob("*.[ch]*"))):
        inputs.update(source.name.encode() + source.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / LIBRARIES[device] / inputs.hexdigest()[:16]


def _build(device: str, folder: Path) -> Path:
    for stale in folder.glob("build-*"):  # of killed builds
        shutil.rmtree(stale, ignore_errors=True)
    name = LIBRARIES[device]
    print(f"deepspeed_alst: compiling {name} once into {folder}, up to a minute", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as build_directory:
        flags = _CXX_FLAGS, _nvcc_flags(device)
        try:
            cpp_extension.load(name, _sources(device), *flags, build_directory=build_directory, is_python_module=False)
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
            log = folder / "failed.log"
            log.write_text(str(error), encoding="utf-8")
            lines = [line.strip() for line in str(error).splitlines()[1:] if "error" in line.lower()]
            raise OpBuildError((lines or [str(error)])[0], f"see the compiler's output in {log}") from error
        (library,) = Path(build_directory).glob("*.so")
        return library.replace(folder / library.name)


@functools.cache
def load(device: str) -> str:
    """Load the compiled ops for ``"cpu"`` or ``"cuda"`` once per process: ``"csrc op"``, or ``"torch (<reason>)"``.

    Without the op PyTorch computes the same result, and a warning gives the reason and a remedy.
    """
    if device not in LIBRARIES:
        return f"torch (no csrc op for {device})"
    try:
        load_or_build(device)
    except Exception as error:  # compilers raise many types; training can go on
        reason = str(error) if isinstance(error, OpBuildError) else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"deepspeed_alst: csrc's ops on {device} fall back to PyTorch, slower with the same result: {reason}. "
            f"To use them: {getattr(error, 'fix', 'see the messages above')}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"torch ({reason.splitlines()[0]})"
    return "csrc op"

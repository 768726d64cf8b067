"""DeepSpeed builders of csrc/'s op: prebuilt at installation (``DS_BUILD_ALST=1``), else built at first use.

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
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder, assert_no_cuda_mismatch
from torch.utils import cpp_extension

_PACKAGE = Path(__file__).resolve().parent.parent
# A build takes 10 s on CPU and a minute for CUDA; a lock held for longer than this means a hang.
_WAIT_SECONDS = 300.0
# Oldest torch whose stable ABI has all that the sources use; the binaries run on it and on every later one.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Without DeepSpeed's -march=native: one binary for all hosts that share a home or an image. Fused multiply-adds would
# round once where the reference rounds twice.
_CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-ffp-contract=off", _TORCH_TARGET]
_ARCHITECTURES = (80, 90, 100)


class OpBuildError(RuntimeError):
    """Error of an op that cannot be built or loaded here, with a fix in ``way_out``."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(reason)
        self.way_out = way_out


@contextlib.contextmanager
def only_builder(path: Path) -> Iterator[None]:
    """Hold a file lock.

    Raises:
        OpBuildError: another process has held the lock for too long.
    """
    deadline = time.monotonic() + _WAIT_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = f"another process has been building it for {_WAIT_SECONDS:.0f} s"
                    raise OpBuildError(reason, f"end that process; fuser {path} names it") from None
                time.sleep(0.1)
        yield


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def first_error(output: str) -> str:
    """Return the line of a compiler's output to show: the first with "error", else the first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["the build failed without a word"]
    return next((line for line in lines[1:] if "error" in line.lower()), lines[0])


def source_folder() -> Path:
    """Return the folder of the C++ sources: inside an installed package, next to the one of a checkout."""
    inside = _PACKAGE / "csrc"
    return inside if inside.is_dir() else _PACKAGE.parent / "csrc"


class SumPiecesBuilder(OpBuilder):
    """Builder of ``deepspeed_alst::sum_pieces`` for CPU; the op registers itself with torch when it is loaded."""

    NAME = "alst_sum_pieces"
    SOURCE = "sum_pieces.cpp"

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        """Return the name of the module built at installation."""
        return f"deepspeed_alst.kernels.{self.NAME}_op"

    def sources(self) -> list[str]:
        """Return absolute paths, so that DeepSpeed does not look for them in its own folder."""
        return [str(source_folder() / name) for name in (self.SOURCE, "module.cpp")]

    def cxx_args(self) -> list[str]:
        """Return the C++ compiler's flags."""
        return list(_CXX_FLAGS)

    def why_not(self) -> OpBuildError | None:
        """Return an error that names the missing build dependency, or None."""
        compiler = cpp_extension.get_cxx_compiler().split()[0]
        if shutil.which(compiler) is None:
            way_out = "install g++, or name a compiler in CXX, or install with DS_BUILD_ALST=1 where there is one"
            return OpBuildError(f"no C++ compiler found ({compiler})", way_out)
        if not cpp_extension.is_ninja_available():
            return OpBuildError("no ninja found", "pip install ninja, and have its folder in PATH")
        return None

    def find(self) -> Path | None:
        """Load the library that is there, prebuilt or built before, and return its path; None if none loads."""
        for library in (*_PACKAGE.glob(f"kernels/{self.NAME}_op.*so"), *self._folder().glob("*.so")):
            with contextlib.suppress(OSError):  # for another libc, or of an interrupted copy
                torch.ops.load_library(library)
                return library
        return None

    def load(self, verbose: bool = False) -> Path:
        """Load the library that is there, else build it, in the first process of this host that needs it.

        Raises:
            OpBuildError: a dependency is missing, the folder is not writable, or the compiler failed.
        """
        if library := self.find():
            return library
        if problem := self.why_not():
            raise problem
        folder = self._folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with only_builder(folder / "builder"):
                return self.find() or self._build(folder, verbose)
        except OSError as error:
            reason = f"cannot build in {folder}: {error.strerror or error}"
            raise OpBuildError(reason, "name a folder in TORCH_EXTENSIONS_DIR") from error

    def _folder(self) -> Path:
        """Return the folder of builds of exactly these sources and flags, not shared by package versions."""
        inputs = hashlib.sha256(str(torch.version.cuda).encode())
        for source in (Path(__file__), *sorted(source_folder().glob("*.[ch]*"))):
            inputs.update(source.name.encode() + source.read_bytes())
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
        return Path(root) / self.name / inputs.hexdigest()[:16]

    def _build(self, folder: Path, verbose: bool) -> Path:
        for left in folder.glob("build-*"):  # by killed builders
            shutil.rmtree(left, ignore_errors=True)
        print(f"deepspeed_alst: compiling {self.NAME} into {folder}, once; up to a minute", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as workplace:
            try:
                with environment(TORCH_EXTENSIONS_DIR=workplace):
                    self.jit_load(verbose)
            except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
                log = folder / "failed.log"
                log.write_text(str(error), encoding="utf-8")
                raise OpBuildError(first_error(str(error)), f"the whole output is in {log}") from error
            (library,) = Path(workplace).glob("*/*.so")
            with library.open("rb") as file:
                os.fsync(file.fileno())  # loading a library with pages lost in a power cut ends the process
            return library.replace(folder / library.name)


class CudaSumPiecesBuilder(SumPiecesBuilder, CUDAOpBuilder):
    """Builder of ``deepspeed_alst::sum_pieces`` for CUDA; its library has no CPU kernel."""

    NAME = "alst_sum_pieces_cuda"
    SOURCE = "sum_pieces.cu"

    def cxx_args(self) -> list[str]:
        """Return flags with USE_CUDA, which declares the stable ABI's CUDA streams."""
        return [*_CXX_FLAGS, "-DUSE_CUDA"]

    def nvcc_args(self) -> list[str]:
        """Return flags without DeepSpeed's --use_fast_math, which changes rounding and flushes subnormals."""
        home = cpp_extension.CUDA_HOME
        return cuda_flags(f"{home}/bin/nvcc") if home else []

    def find(self) -> Path | None:
        """Load the library as on CPU, on supported devices."""
        return None if _unsupported() else super().find()

    def why_not(self) -> OpBuildError | None:
        """Return an error that names the unsupported device or the missing build dependency, or None."""
        if problem := _unsupported():
            return problem
        if cpp_extension.CUDA_HOME is None:
            return OpBuildError("no CUDA toolkit found", "install one and name its folder in CUDA_HOME")
        try:
            assert_no_cuda_mismatch(self.name)
        except Exception as error:  # DeepSpeed raises plain Exceptions
            return OpBuildError(str(error), "install the CUDA toolkit that torch was built with")
        return super().why_not()


def _unsupported() -> OpBuildError | None:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return OpBuildError("torch finds no CUDA device here", "run on a machine that has one")
    major, minor = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if 10 * major + minor < _ARCHITECTURES[0]:
        return OpBuildError(f"compute capability {major}.{minor}", "it is compiled for 8.0 and newer")
    return None


def cuda_flags(nvcc: str) -> list[str]:
    """Return nvcc's flags: each of our architectures that it supports, and PTX for newer ones."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in _ARCHITECTURES if f"compute_{each}" in known]
    oldest = f"compute_{_ARCHITECTURES[0]}"
    return ["-O3", "-std=c++20", "-DUSE_CUDA", _TORCH_TARGET, *targets, f"-gencode=arch={oldest},code={oldest}"]


BUILDERS: dict[str, type[SumPiecesBuilder]] = {"cpu": SumPiecesBuilder, "cuda": CudaSumPiecesBuilder}
"""Builders by device."""


@functools.cache
def load(device_type: str) -> str:
    """Load the compiled op over its PyTorch reference, once per process; return which one will compute.

    Without it torch computes with the same result, and a warning gives the reason and a fix.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.

    Returns:
        ``"csrc op"``, or ``"torch (<why>)"``.
    """
    if device_type not in BUILDERS:
        return f"torch (no csrc op for {device_type})"
    try:
        BUILDERS[device_type]().load()
    except Exception as error:  # compilers raise many types; training can go on
        reason = str(error) if isinstance(error, OpBuildError) else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"deepspeed_alst: sum_pieces on {device_type} runs in torch, slower and with the same result: {reason}. "
            f"Way out: {getattr(error, 'way_out', 'see the messages above')}.",
            RuntimeWarning,
            stacklevel=2,
        )
        return f"torch ({reason.splitlines()[0]})"
    return "csrc op"

"""DeepSpeed builders of the csrc/ ops: prebuilt at installation (``DS_BUILD_ALST=1``), or built at first use.

A build at first use runs in its own folder and is moved into place when complete. A killed build, its orphaned
compilers, and torch's lock file, which outlives its builder, therefore cannot break or block a later build. The lock
(``build_once``) only keeps the ranks of a host from all building the same op.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from deepspeed.ops.op_builder.builder import CUDAOpBuilder, OpBuilder, assert_no_cuda_mismatch
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder
from torch.utils import cpp_extension

from deepspeed_alst.ops.build_once import OpBuildError, environment, first_error, only_builder

_PACKAGE = Path(__file__).resolve().parent.parent
# Oldest torch whose stable ABI has all that the sources use; the binaries run on it and on every later one.
_TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Fused multiply-adds would round once where the reference rounds twice.
_CXX_FLAGS = ["-O3", "-std=c++20", "-g0", "-ffp-contract=off", _TORCH_TARGET]
_ARCHITECTURES = (80, 90, 100)


def source_folder() -> Path:
    """Return the folder of the C++ sources, inside the package or next to it.

    Raises:
        OpBuildError: neither has them.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "sum_pieces.h").is_file():
            return folder
    raise OpBuildError(f"no C++ sources beside {_PACKAGE}", "install the package again")


class _AlstBuilder(OpBuilder):
    """Base of the builders for all devices: source and binary locations, and safe builds."""

    BUILD_VAR: str
    NAME: str
    FILES: tuple[str, ...]
    OPS: tuple[str, ...]
    """Ops that its library registers kernels of."""

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        """Return the name of the module built at installation."""
        return f"deepspeed_alst.ops.{self.NAME}_op"

    def sources(self) -> list[str]:
        """Return absolute paths, so that DeepSpeed does not look for them in its own folder."""
        return [str(source_folder() / name) for name in (*self.FILES, "module.cpp")]

    def include_paths(self) -> list[str]:
        """Return the folder of the headers."""
        return [str(source_folder())]

    def cxx_args(self) -> list[str]:
        """Return flags without DeepSpeed's -march=native: one binary for all hosts that share a home or an image."""
        return list(_CXX_FLAGS)

    def why_not(self) -> OpBuildError | None:
        """Return an error that names the missing build dependency, or None."""
        compiler = cpp_extension.get_cxx_compiler().split()[0]
        if shutil.which(compiler) is None:
            return OpBuildError(
                f"no C++ compiler found ({compiler})",
                "install g++ or name a compiler in CXX, or install the package with DS_BUILD_ALST=1 where there is one",
            )
        if not cpp_extension.is_ninja_available():
            return OpBuildError("no ninja found", "pip install ninja, and have its folder in PATH")
        return None

    def find(self) -> str:
        """Return the kind of binary that loads here: "prebuilt", "built", or "" for none."""
        with contextlib.suppress(ImportError):
            importlib.import_module(self.absolute_name())
            return "prebuilt"
        return "built" if self._built(self._build_folder()) else ""

    def load(self, verbose: bool = False) -> ModuleType:
        """Load the op's module: prebuilt, else built earlier, else built now.

        Raises:
            OpBuildError: it cannot be built here; its ``way_out`` names a fix.
        """
        if self.name not in OpBuilder._loaded_ops:
            # If a prebuilt op does not load (another libc, an interrupted copy), build it.
            with contextlib.suppress(ImportError):
                OpBuilder._loaded_ops[self.name] = importlib.import_module(self.absolute_name())
        if self.name not in OpBuilder._loaded_ops:
            OpBuilder._loaded_ops[self.name] = self.jit_load(verbose)
        return OpBuilder._loaded_ops[self.name]

    def jit_load(self, verbose: bool = True) -> ModuleType:
        """Build the op at first use, in the first process of this host that needs it.

        Raises:
            OpBuildError: a dependency is missing, the folder is not writable, or the compiler failed.
        """
        folder = self._build_folder()
        if module := self._built(folder):
            return module
        if problem := self.why_not():
            raise problem
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with only_builder(folder / "builder") as alone:
                if module := self._built(folder):
                    return module
                if alone:  # left by killed builders
                    for left in folder.glob("build-*"):
                        shutil.rmtree(left, ignore_errors=True)
                return self._build(folder, verbose)
        except OSError as error:
            raise OpBuildError(
                f"cannot build in {folder}: {error.strerror or error}", "name a folder in TORCH_EXTENSIONS_DIR"
            ) from error

    def _build_folder(self) -> Path:
        """Return the binary folder for exactly these sources and flags, not shared by package versions."""
        inputs = hashlib.sha256(
            repr((self.cxx_args(), self.nvcc_args(), sys.version_info[:2], torch.version.cuda)).encode()
        )
        for source in sorted(source_folder().glob("*.[ch]*")):
            inputs.update(source.name.encode() + source.read_bytes())
        root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
        return Path(root) / self.name / inputs.hexdigest()[:16]

    def _built(self, folder: Path) -> ModuleType | None:
        """Load the module built here before; None if there is none that loads."""
        for library in sorted(folder.glob("*.so")):
            spec = importlib.util.spec_from_file_location(library.stem, library)
            assert spec is not None and spec.loader is not None  # Python knows the suffix
            with contextlib.suppress(ImportError):
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
        return None

    def _build(self, folder: Path, verbose: bool) -> ModuleType:
        workplace = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
        # Of all ranks on a host only the lock holder gets here.
        print(f"deepspeed_alst: compiling {self.NAME} into {folder}, once; up to a minute", file=sys.stderr, flush=True)
        try:
            with environment(TORCH_EXTENSIONS_DIR=str(workplace)):
                module = super().jit_load(verbose)
            for library in workplace.glob("*/*.so"):
                with library.open("rb") as file:
                    os.fsync(file.fileno())  # loading a library with pages lost in a power cut ends the process
                library.replace(folder / library.name)  # atomic
            return module
        except (RuntimeError, ImportError, subprocess.SubprocessError) as error:
            (folder / "failed.log").write_text(str(error), encoding="utf-8")
            raise OpBuildError(first_error(str(error)), f"the whole output is in {folder / 'failed.log'}") from error
        finally:
            shutil.rmtree(workplace, ignore_errors=True)


class _AlstCpuBuilder(_AlstBuilder, CPUOpBuilder):
    """Base of the CPU builders."""

    def builder(self) -> Any:
        """Return the extension for a build at installation: one for all later CPythons."""
        return cpp_extension.CppExtension(
            name=self.absolute_name(),
            sources=self.sources(),
            include_dirs=self.include_paths(),
            extra_compile_args={"cxx": self.cxx_args()},
            py_limited_api=True,
        )


class SumPiecesBuilder(_AlstCpuBuilder):
    """Builder of ``deepspeed_alst::sum_pieces`` for CPU."""

    BUILD_VAR = "DS_BUILD_ALST_SUM_PIECES"
    NAME = "alst_sum_pieces"
    FILES = ("sum_pieces.cpp",)
    OPS = ("sum_pieces",)


class TileOpsBuilder(_AlstCpuBuilder):
    """Builder of the CPU counterparts of the Triton kernels."""

    BUILD_VAR = "DS_BUILD_ALST_TILE_OPS"
    NAME = "alst_tile_ops"
    FILES = ("cross_entropy.cpp", "gated.cpp", "pack_heads.cpp")
    OPS = (
        "cross_entropy_",
        "gated_activation_",
        "gated_gradients_",
        "pack_heads",
        "unpack_heads_",
    )

    def cxx_args(self) -> list[str]:
        """Return flags with fused multiply-adds: these ops are tested by error, not bit by bit."""
        return [each.replace("contract=off", "contract=fast") for each in _CXX_FLAGS]


class CudaSumPiecesBuilder(_AlstBuilder, CUDAOpBuilder):
    """Builder of ``deepspeed_alst::sum_pieces`` for CUDA; its library has no CPU kernel."""

    BUILD_VAR = "DS_BUILD_ALST_SUM_PIECES_CUDA"
    NAME = "alst_sum_pieces_cuda"
    FILES = ("sum_pieces.cu",)
    OPS = ("sum_pieces",)

    def cxx_args(self) -> list[str]:
        """Return flags with USE_CUDA, which declares the stable ABI's CUDA streams."""
        return [*_CXX_FLAGS, "-DUSE_CUDA"]

    def nvcc_args(self) -> list[str]:
        """Return flags without DeepSpeed's --use_fast_math, which changes rounding and flushes subnormals."""
        home = cpp_extension.CUDA_HOME
        return cuda_flags(f"{home}/bin/nvcc") if home else []

    def why_not(self) -> OpBuildError | None:
        """Return an error that names the missing build dependency, or None."""
        if cpp_extension.CUDA_HOME is None:
            return OpBuildError("no CUDA toolkit found", "install one and name its folder in CUDA_HOME")
        try:
            assert_no_cuda_mismatch(self.name)
        except Exception as error:  # DeepSpeed raises plain Exceptions
            return OpBuildError(str(error), "install the CUDA toolkit that torch was built with")
        return super().why_not()

    def load(self, verbose: bool = False) -> ModuleType:
        """Load the op as on CPU, on supported devices.

        Raises:
            OpBuildError: no device, compute capability below 8.0, or as on CPU.
        """
        if torch.version.hip is not None or not torch.cuda.is_available():
            raise OpBuildError("torch finds no CUDA device here", "run on a machine that has one")
        oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if 10 * oldest[0] + oldest[1] < _ARCHITECTURES[0]:
            raise OpBuildError(f"compute capability {oldest[0]}.{oldest[1]}", "it is compiled for 8.0 and newer")
        return super().load(verbose)

    def builder(self) -> Any:
        """Return the extension for a build at installation: one for all later CPythons."""
        return cpp_extension.CUDAExtension(
            name=self.absolute_name(),
            sources=self.sources(),
            include_dirs=self.include_paths(),
            extra_compile_args={"cxx": self.cxx_args(), "nvcc": self.nvcc_args()},
            py_limited_api=True,
        )


BUILDERS: dict[tuple[str, str], type[_AlstBuilder]] = {
    ("sum_pieces", "cpu"): SumPiecesBuilder,
    ("sum_pieces", "cuda"): CudaSumPiecesBuilder,
    ("tile_ops", "cpu"): TileOpsBuilder,
}
"""Builders by library and device."""


def cuda_flags(nvcc: str) -> list[str]:
    """Return nvcc's flags: each of our architectures that it supports, and PTX for newer ones."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    targets = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in _ARCHITECTURES if f"compute_{each}" in known]
    oldest = f"compute_{_ARCHITECTURES[0]}"
    return ["-O3", "-std=c++20", "-DUSE_CUDA", _TORCH_TARGET, *targets, f"-gencode=arch={oldest},code={oldest}"]

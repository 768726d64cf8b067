"""The package and what it needs. Bounds are those of docs/versions.md, which `make canary` writes."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithSources(build_py):
    """Puts csrc/, from which an op is built at first use, and ds_configs/ into the package; a checkout has both."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for name in ("csrc", "ds_configs"):
                shutil.copytree(HERE / name, Path(self.build_lib) / "deepspeed_alst" / name, dirs_exist_ok=True)


def prebuilt_ops():
    """What builds the ops of csrc/ with the package, if DS_BUILD_ALST=1.

    Needs torch and DeepSpeed at build time: pip install --no-build-isolation.
    """
    if os.environ.get("DS_BUILD_ALST") != "1":
        return {"cmdclass": {"build_py": BuildWithSources}}
    sys.path.insert(0, str(HERE))
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension

    from deepspeed_alst.kernels.builder import LIBRARIES, extension

    return {
        "ext_modules": [extension(device) for device in LIBRARIES if device != "cuda" or CUDA_HOME is not None],
        "cmdclass": {"build_py": BuildWithSources, "build_ext": BuildExtension},
    }


setup(
    **prebuilt_ops(),
    name="deepspeed-alst",
    version="0.1.0",
    description="Arctic Long Sequence Training for Hugging Face models on DeepSpeed, switched on by ds_config keys",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    keywords="deepspeed transformers long-context sequence-parallelism ulysses alst activation-offload",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["deepspeed_alst", "deepspeed_alst.*"]),
    install_requires=[
        "torch>=2.13.0",  # tensors, gloo and NCCL
        "deepspeed>=0.19.8,<0.20",  # the engine; its internals are relied upon, so no untested release
        "transformers>=5.23.0",  # the models, and their attention and mask interfaces
        "accelerate>=1.15.0",  # transformers' HfDeepSpeedConfig and Trainer need it
        "triton>=3.8.0; platform_system == 'Linux'",  # the tile kernels
        "liger-kernel>=0.8.5; platform_system == 'Linux'",  # Liger's kernels
        "pydantic>=2.14",  # the typed config and its error messages
        "rich>=15.0",  # tables
        "psutil",  # the host's memory
        "packaging",  # ranges of versions, in ds_alst report
    ],
    extras_require={
        "plots": ["matplotlib>=3.11"],  # the ledger's picture
        "notebook": ["ipykernel>=7.0", "matplotlib>=3.11", "nbclient>=0.11"],  # examples/tour.ipynb
        "docs": ["mkdocs-material>=9.8,<10", "codespell>=2.4"],  # make docs
        "dev": [
            "peft>=0.21.0",  # LoRA
            "trl>=1.16.0",  # SFTTrainer
            "matplotlib>=3.11",
            "cogapp>=3.6",  # make docs-data
            "sybil>=10.1",  # code blocks of README and docs, make examples
            "ipykernel>=7.0",  # examples/tour.ipynb, make examples
            "nbclient>=0.11",
            "ninja",  # builds DeepSpeed's CPU communication op
            "pytest>=9.0",
            "hypothesis>=6.170",  # bad input of every kind
            "jsonschema>=4.26",  # ds_configs/alst.schema.json against the parser
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",  # make test, two files at a time
            "ruff>=0.17",
            "mypy>=2.4",
        ],
    },
    # PyTorch loads the entry points of torch.backends at `import torch`.
    py_modules=["_deepspeed_alst_autoload"],
    entry_points={
        "torch.backends": ["deepspeed_alst = _deepspeed_alst_autoload:entry_point"],
        "console_scripts": ["ds_alst = deepspeed_alst.cli.main:main"],
    },
)

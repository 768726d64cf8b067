"""Modules that rank processes share: they fork from a process that has only imported this one (``ranks.fork_context``).

Besides the libraries, it is what a first engine and a first Trainer import on their way. None of it may start threads,
which a fork would lose; only pyarrow's allocator has one, and knows of forks.
"""

import importlib

import deepspeed

for _name in (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
    "benchmarks.cells",
    "deepspeed_alst.initialize",
):
    importlib.import_module(_name)

# Made at the first access, for which DeepSpeed compiles a program.
assert deepspeed.ops.__compatible_ops__

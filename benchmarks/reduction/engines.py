"""DeepSpeed engines with known gradients, reduced by DeepSpeed or by this package.

The gradient of each parameter is a random bf16 vector determined by rank, micro-step and parameter, so any rank can
compute the expected result in fp64.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deepspeed_alst.core.patching import PatchSet

# The ranks import deepspeed after benchmarks.ranks has set its environment.


class System(NamedTuple):
    """Implementation of the reduction, and the dtype of its sums."""

    ours: bool
    dtype: str


SYSTEMS = {
    "DeepSpeed fp32": System(False, "fp32"),
    "DeepSpeed bf16": System(False, "bf16"),
    "here fp32": System(True, "fp32"),
    "here bf16": System(True, "bf16"),
}
BASELINE, _, OURS, _ = SYSTEMS


@dataclass(frozen=True)
class Case:
    """Setup that all systems are run on."""

    world_size: int
    stage: int
    accumulation: str
    """Accumulation dtype of the micro-steps' gradients."""
    gas: int
    sizes: tuple[int, ...]
    """Elements of each parameter."""
    bucket: int
    slice_bytes: int

    @property
    def name(self) -> str:
        """Short description."""
        return f"{self.world_size} ranks, ZeRO {self.stage}, accumulated in {self.accumulation}"


def cases(world_sizes: tuple[int, ...], gas: tuple[int, ...], **sizes: Any) -> list[Case]:
    """List all stages and accumulation dtypes; DeepSpeed 0.19.8 rejects fp32 for bf16 models at stage 0."""
    return [
        Case(world_size, stage, accumulation, steps, **sizes)
        for world_size in world_sizes
        for stage in (0, 1, 2, 3)
        for accumulation in ("bf16", "fp32")
        for steps in gas
        if stage or accumulation == "bf16"
    ]


class Vectors(torch.nn.Module):
    """Parameters of given sizes, each with a gradient passed to the forward."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.vectors = torch.nn.ModuleList(torch.nn.Linear(numel, 1, bias=False) for numel in sizes)

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return a sum whose derivative by each parameter is its gradient."""
        products = [vector(gradient_n) for vector, gradient_n in zip(self.vectors, gradients, strict=True)]
        return torch.stack(products).sum()


def gradients(case: Case, rank: int, micro_step: int) -> list[torch.Tensor]:
    """Return a rank's gradients in a micro-step, times the number of micro-steps (a power of two)."""
    make = torch.Generator().manual_seed(1000 * rank + micro_step)
    return [torch.randn(numel, generator=make).bfloat16() for numel in case.sizes]


def build(case: Case, system: System) -> Any:
    """Build a DeepSpeed engine for the case, with at most our reduction installed.

    ``communication_data_type`` stands for an SP run's ``seq_parallel_communication_data_type``.
    """
    import deepspeed

    from deepspeed_alst.grad_reduction.reduce import Reduction
    from deepspeed_alst.grad_reduction.zero_paths import install_reduction
    from deepspeed_alst.kernels.builder import load

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.gas,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": case.accumulation},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": case.stage, "reduce_bucket_size": case.bucket},
        "steps_per_print": 10**9,
    }
    config |= {} if system.ours else {"communication_data_type": system.dtype}
    model = Vectors(case.sizes)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    # At stage 0 and with BF16_Optimizer (stage 1 with fp32), DeepSpeed ignores the configured bucket size.
    allreduce_gradients = engine.allreduce_gradients
    engine.allreduce_gradients = lambda bucket_size=case.bucket: allreduce_gradients(bucket_size)
    if system.ours:
        if (adder := load("cpu")) != "csrc op":
            raise RuntimeError(f"the local sum is not the compiled op: {adder}")
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[system.dtype]
        install_reduction(engine, Reduction(dtype, case.slice_bytes), PatchSet())
    return engine


def backward(engine: Any, case: Case, micro_step: int) -> None:
    """Run the backward of one micro-step on this rank."""
    engine.backward(engine(gradients(case, dist.get_rank(), micro_step)))


def around_reductions(engine: Any, inside: Callable[[], AbstractContextManager[Any]]) -> None:
    """Wrap each reduction of one bucket in a context.

    Steps common to all systems are outside: gradients are in their bucket before, and the gradients that a rank keeps
    are copied out after (except at stage 3, where the copy is part of the reduction).
    """
    stage3 = "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads"
    # DeepSpeed splits BF16_Optimizer's gradients into buckets, this package takes them whole.
    is_bf16_optimizer = hasattr(engine.optimizer, "fp32_groups_gradients_flat")
    owner, name = next(
        (owner, name)
        for owner, name in (
            (engine.optimizer, stage3),
            (engine.optimizer, "average_tensor"),
            (engine, "buffered_allreduce_fallback" if is_bf16_optimizer else "allreduce_and_copy"),
        )
        if hasattr(owner, name)
    )
    reduce = getattr(owner, name)

    def reduce_inside(*args: Any, **kwargs: Any) -> Any:
        with inside():
            return reduce(*args, **kwargs)

    setattr(owner, name, reduce_inside)

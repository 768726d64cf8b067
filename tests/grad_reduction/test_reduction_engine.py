"""Our reduction on live engines: DeepSpeed's norms, overflow checks, offload and undo go on working; the report."""

import functools
import math
import types
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks.cells import Cell, build_model, ds_config, model_config
from deepspeed_alst.core.patching import PatchSet
from deepspeed_alst.grad_reduction.reduce import Reduction
from tests.sequence_parallel.test_features import allow_fp16_on_cpu
from tests.system.test_initialize import initialize

_ON_HOST = {"offload_optimizer": {"device": "cpu"}}


class Odd(torch.nn.Module):
    """Parameters of one element, of odd sizes, and larger than the bucket; its gradient is each rank's own factor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weights = torch.nn.ParameterList(torch.randn(size) for size in ((1,), (7, 3), (1001,), (64, 5), (2,)))

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return sum((weight.float() * factor * (1 + weight.float())).sum() for weight in self.weights)


def train(stage: int, ours: bool, changed: dict[str, Any], steps: int = 2, factors=None) -> dict[str, Any]:
    """Two steps of two micro-steps; gradients of the last, norm and weights, and whether a step was skipped."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from deepspeed_alst.grad_reduction.zero_paths import install_reduction

    model = Odd()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **changed,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 400,
            "stage3_param_persistence_threshold": 0,
            **changed.get("zero_optimization", {}),
        },
    }
    if not ours:
        config["communication_data_type"] = "fp32"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    with PatchSet() as undo:
        if ours:
            install_reduction(engine, Reduction(slice_bytes=4096), undo)
        for step in range(steps):
            for micro in range(2):
                factor = factors(step, micro) if factors else 0.3 + dist.get_rank() + 0.17 * micro
                engine.backward(engine(torch.tensor(factor)))
                grads = [safe_get_full_grad(param) for param in model.weights] if micro and factors is None else []
                engine.step()
        result = {
            "grads": grads,
            "norm": float(engine.get_global_grad_norm() or math.nan),
            "weights": [safe_get_full_fp32_param(param) for param in model.weights] if stage else [*model.weights],
            "skipped": engine.skipped_steps,
        }
    result["left"] = [
        name
        for owner in (engine, engine.optimizer)
        for name, value in vars(owner).items()
        if isinstance(value, types.FunctionType) and "install" in value.__qualname__
    ]
    engine.destroy()
    return result


def compare(stage: int, changed: dict[str, Any]) -> None:
    theirs, ours = (train(stage, mine, changed) for mine in (False, True))
    assert ours["left"] == [] and ours["skipped"] == 0
    # BF16_Optimizer's norm is added up in another order: it may differ in the last bit, and clipped weights with it.
    has_bf16_optimizer = stage == 1 and "data_types" in changed and changed.get("zero_optimization") != _ON_HOST
    same = functools.partial(torch.allclose, rtol=1e-6, atol=1e-7) if has_bf16_optimizer else torch.equal
    for what, equal in (("grads", torch.equal), ("weights", same)):
        for index, (own, other) in enumerate(zip(ours[what], theirs[what], strict=True)):
            assert equal(own.float(), other.float()), f"{what} of parameter {index}"
    assert math.isnan(theirs["norm"]) or same(torch.tensor(ours["norm"]), torch.tensor(theirs["norm"]))


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
OFFLOAD = {"zero_optimization": _ON_HOST}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        FP32_SUMS,
        {"zero_optimization": {"reduce_scatter": False}},
        {"zero_optimization": {"overlap_comm": True}, **FP32_SUMS},
        {"zero_optimization": {"contiguous_gradients": False}, **FP32_SUMS},
        {"zero_optimization": {"contiguous_gradients": False}},
        OFFLOAD,
        {**OFFLOAD, **FP32_SUMS},
    ],
    ids=[
        "plain",
        "fp32",
        "no scatter",
        "overlap, fp32",
        "not contiguous, fp32",
        "not contiguous",
        "offload",
        "offload, fp32",
    ],
)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_with_it_is_deepspeeds_with_fp32_sums_bit_by_bit(stage, changed, ranks2):
    ranks2.run(compare, stage, changed)


def test_without_zero_too(ranks2):
    ranks2.run(compare, 0, {})


def host_shares() -> None:
    """Shares that are kept on the host are made on the device, a parameter at a time, and DeepSpeed takes them over."""
    from deepspeed_alst.grad_reduction import zero_paths as reduction

    here = train(3, True, FP32_SUMS)
    # On a machine without a GPU no tensor is anywhere but on the device.
    accelerator = types.SimpleNamespace(on_accelerator=lambda tensor: False)
    with mock.patch.object(reduction, "get_accelerator", lambda: accelerator):
        there = train(3, True, FP32_SUMS)
    assert all(torch.equal(a, b) for a, b in zip(here["weights"], there["weights"], strict=True))


def test_shares_on_the_host_are_the_same(ranks2):
    ranks2.run(host_shares)


def bad_micro_step(bad: float):
    return lambda step, micro: bad if (step, micro, dist.get_rank()) == (0, 1, 1) else 0.5


def overflowed(stage: int) -> tuple[int, bool]:
    """fp16 with a dynamic scale: an infinity on one rank skips the step on all."""
    scaled = {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 2, "hysteresis": 1}}
    result = train(stage, True, scaled, factors=bad_micro_step(math.inf))
    return result["skipped"], all(weight.isfinite().all() for weight in result["weights"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_infinity_on_one_rank_reaches_the_overflow_check_of_all(stage, ranks2):
    ranks2.run(allow_fp16_on_cpu)
    assert ranks2.run(overflowed, stage) == [(1, True)] * 2


def norm_of_nan(stage: int) -> float:
    return train(stage, True, {}, steps=1, factors=bad_micro_step(math.nan))["norm"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_nan_on_one_rank_reaches_the_norm_of_all(stage, ranks2):
    # DeepSpeed makes an infinity of a norm that is no number.
    assert ranks2.run(norm_of_nan, stage) == [math.inf] * 2


def uneven(immediate: bool, again: bool, ours: bool) -> tuple[list[torch.Tensor], list[torch.Tensor], float]:
    """ZeRO 1 with fp32 accumulation: a parameter that only the last rank uses, which the first one owns."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from deepspeed_alst.grad_reduction.zero_paths import install_reduction

    model = Odd()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.05,
        "bf16": {"enabled": True, "immediate_grad_update": immediate},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1},
    }
    if not ours:
        config["communication_data_type"] = "fp32"
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    weights = list(model.weights)
    before = [safe_get_full_fp32_param(param).clone() for param in weights]
    with PatchSet() as undo:
        if ours:
            install_reduction(engine, Reduction(slice_bytes=4096), undo)
        for backward in range(1 + again):
            factor = 0.3 + dist.get_rank() + backward
            loss = sum((w.float() * factor).sum() for w in (weights if dist.get_rank() else weights[1:]))
            engine.backward(loss)
        grads = [safe_get_full_grad(param).clone() for param in weights]
        engine.step()
        after = [safe_get_full_fp32_param(param) for param in weights]
        norm = float(engine.get_global_grad_norm())
    engine.destroy()
    return grads, [old - new for old, new in zip(before, after, strict=True)], norm


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("immediate", [True, False])
def test_owners_clip_what_other_ranks_alone_have_a_gradient_of(immediate, again, ranks2):
    theirs, _, _ = ranks2.run(uneven, immediate, again, False)[0]
    for grads, changes, norm in ranks2.run(uneven, immediate, again, True):
        # A second backward before the step adds to the average, as it does in DeepSpeed.
        assert all(torch.equal(own, other) for own, other in zip(grads, theirs, strict=True))
        # DeepSpeed's own norm and clipping leave out what a rank has no gradient of.
        assert norm == pytest.approx(math.sqrt(sum(float(grad.square().sum()) for grad in grads)), rel=1e-5)
        for grad, change in zip(grads, changes, strict=True):
            assert torch.allclose(change, grad * 0.05 / norm, rtol=1e-3, atol=1e-6)


def report_of(cell: Cell, changed: dict[str, Any]) -> dict[str, str]:
    """The rows of the activation report as rank 0 prints them."""
    from deepspeed_alst import initialize as story

    rows: dict[str, str] = {}
    with mock.patch.object(story, "print_report", rows.update):
        engine = initialize(changed, cell)
    engine.destroy()
    return rows


def rows_with(ranks: Any, cell: Cell, **changed: Any) -> dict[str, str]:
    return ranks.run(report_of, cell, changed)[0]


def test_the_report_follows_the_json(ranks2):
    bf16 = Cell(stage=2, dtype="bf16")
    rows = rows_with(ranks2, bf16)
    assert rows["reduction"].startswith("ZeRO stage 2, summed in fp32 (") and "2 ranks" in rows["reduction"]
    assert rows["on the wire"].startswith("bf16, then bf16: ")
    assert rows["gradient buckets"] == "2,000 elements (reduce_bucket_size)"

    low = rows_with(ranks2, bf16, seq_parallel_communication_data_type="bf16")
    assert "summed in bf16 over" in low["reduction"]
    precise = rows_with(ranks2, bf16, data_types={"grad_accum_dtype": "fp32"})
    assert precise["on the wire"].startswith("bf16, then fp32: ")
    whole = rows_with(ranks2, Cell(stage=3))
    assert whole["on the wire"].startswith("fp32: ")
    for size in (123_456, "auto"):
        block = {**ds_config(bf16, 2)["alst"], "reduction": {"bucket_size": size, "slice_bytes": 4096}}
        sliced = rows_with(ranks2, bf16, alst=block)
        assert sliced["largest extra buffers"] == "8.0 KiB"
        assert ("auto: 1/32 of" if size == "auto" else "123,456 elements (alst.reduction.bucket_size)") in sliced[
            "gradient buckets"
        ]


def own_dtype_at_sp1() -> tuple[Any, bool]:
    import deepspeed

    cell = Cell(stage=2, dtype="bf16")
    config = {**ds_config(cell, 1), "communication_data_type": "fp16", "alst": {"tiled_logits_loss": True}}
    model = build_model(model_config(cell))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    found = engine.optimizer.communication_data_type, "gradient_reduction_w_predivide" in vars(engine.optimizer)
    engine.destroy()
    return found


def test_without_sequence_parallelism_the_users_own_dtype_counts(ranks2):
    assert ranks2.run(own_dtype_at_sp1) == [(torch.float16, False)] * 2

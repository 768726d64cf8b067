"""Test cases of the RMSNorm kernels, forward and backward, run by judge.py.

Legend: T rows, H elements of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Verdict, errors_of

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

# Hidden sizes of Llama 3 8B, 70B and 405B, Qwen3-32B, gpt-oss; head dims of Qwen3 and Gemma 3; 65 is unaligned.
COMPILED = (
    ("bf16, H 4096", (4096, _BF16, True)),
    ("bf16, H 8192", (8192, _BF16, True)),
    ("bf16, H 16384", (16384, _BF16, True)),
    ("fp16, H 5120", (5120, _FP16, False)),
    ("bf16, H 2880", (2880, _BF16, False)),
    ("fp32, H 8191", (8191, _FP32, False)),
    ("bf16, H 128", (128, _BF16, True)),
    ("bf16, H 65", (65, _BF16, True)),
    ("fp32, H 128", (128, _FP32, False)),
    ("bf16, H 256, no weight", (256, _BF16, False, False)),
)


@dataclass(frozen=True)
class Case:
    """One launch in each direction."""

    T: int
    H: int
    dtype: torch.dtype
    cast_first: bool = False
    offset: float = 0.0
    weighs: bool = True
    weight_gradient: bool = True
    gap: int = 0
    """Elements between consecutive rows, filled with NaN."""
    size: float = 1.0
    """Standard deviation of the rows' elements."""


CASES = (
    Case(67, 65, _FP32),
    Case(67, 128, _BF16, cast_first=True),
    Case(33, 4096, _BF16, cast_first=True),
    Case(33, 2880, _FP16, offset=1.0, gap=7),
    Case(33, 5120, _FP32, offset=1.0),
    Case(17, 8192, _BF16),
    Case(5, 9000, _FP32),
)


def title(case: Case) -> str:
    """Describe a case."""
    words = [f"[{case.T}, {case.H}] {str(case.dtype).removeprefix('torch.')}"]
    words += ["cast first"] * case.cast_first + [f"offset {case.offset:g}"] * (case.offset != 0)
    words += ["no weight"] * (not case.weighs) + ["rows read twice"] * (case.H > 8192)
    return ", ".join(words)


def launch(H: int, dtype: torch.dtype, cast_first: bool, weighs: bool = True) -> None:
    """Launch the kernels of a forward and a backward on meta tensors."""
    from deepspeed_alst.kernels import rms_norm_ops
    from deepspeed_alst.kernels.registry import registered

    assert registered()["rms_norm"].reference is rms_norm_ops.rms_norm_reference
    x_TH = torch.empty(523, H, dtype=dtype, device="meta")
    weight_H = torch.empty(H, dtype=dtype, device="meta") if weighs else None
    registered()["rms_norm"].launch(x_TH, weight_H, 1e-6, 1.0, cast_first)
    registered()["rms_norm_backward"].launch(x_TH, x_TH, weight_H, 1e-6, 1.0, True)


def judge(case: Case) -> Verdict:
    """Run one forward and one backward in the interpreter and compare with fp64.

    An incomplete result, or a write outside it, is an error too.
    """
    with faithful() as traffic:
        errors = errors_in(case)
    element = case.dtype.itemsize
    # y from x, dx from dy and x; the weight in each direction, and its gradient.
    least = 5 * element * case.T * case.H + case.weighs * (2 * element + 4 * case.weight_gradient) * case.H
    if case.H > 8192:  # both passes read twice, and each row's partial weight gradient is added in memory
        least += 3 * element * case.T * case.H + 8 * case.T * case.H * case.weight_gradient
        least += 2 * element * (case.T - 1) * case.H * case.weighs * 2
    elements = case.T * case.H
    return Verdict(errors, (traffic.read + traffic.written) / elements, least / elements)


def errors_in(case: Case) -> dict[str, tuple[float, float]]:
    """Return the errors of a case's results on this backend, with their limits."""
    from deepspeed_alst.kernels.rms_norm import rms_norm
    from deepspeed_alst.kernels.rms_norm_ops import rms_norm_backward_reference, rms_norm_reference

    torch.manual_seed(0)
    storage = torch.full((case.T, case.H + case.gap), torch.nan, dtype=case.dtype)
    x_TH = storage[:, : case.H]
    x_TH.copy_(case.size * torch.randn(case.T, case.H))
    dy_TH = torch.randn(case.T, case.H).to(case.dtype)
    weight_H = torch.randn(case.H).to(case.dtype) if case.weighs else None
    results = {}
    for name, dtype in (("truth", torch.float64), ("torch", case.dtype)):
        x, dy, weight = (None if each is None else each.to(dtype) for each in (x_TH, dy_TH, weight_H))
        results[name] = (
            rms_norm_reference(x, weight, 1e-6, case.offset, case.cast_first),
            *rms_norm_backward_reference(dy, x, weight, 1e-6, case.offset),
        )
    x_TH.requires_grad_()
    if weight_H is not None:
        weight_H.requires_grad_(case.weight_gradient)
    y_TH = rms_norm(x_TH, weight_H, 1e-6, case.offset, case.cast_first)
    y_TH.backward(dy_TH)
    names, got = ["y", "dx"], [y_TH.detach(), x_TH.grad]
    if weight_H is not None and case.weight_gradient:
        names.append("dweight")
        got.append(weight_H.grad)
    same_y, same_dx, same_dweight = results["torch"]
    same = same_y, same_dx, same_dweight.to(case.dtype)
    return errors_of(names, got, same[: len(got)], results["truth"][: len(got)])


def layer_peak(model_type: str, checkpointing: str, fused: bool) -> float:
    """Return peak bytes per token of a one-layer model on fake tensors, with tiled MLP and loss.

    Args:
        model_type: of ``benchmarks.tiles.shapes.REAL_SIZE``.
        checkpointing: none, "non-reentrant" or "reentrant".
        fused: run norms and rotary embedding as fused ops.
    """
    import dataclasses

    from benchmarks.tiles.shapes import REAL_SIZE, step_of
    from benchmarks.tiles.systems import System
    from deepspeed_alst.integrations.fused import fuse_norms_and_rope

    class Fused(System):
        def _loss_of(self, model: Any, *rest: Any) -> Any:
            fuse_norms_and_rope(model, rest[-1])
            return super()._loss_of(model, *rest)

    shape = next(each for each in REAL_SIZE if each.model_type == model_type)
    system = (Fused if fused else System)("ours", checkpointing)
    ledger = step_of(dataclasses.replace(shape, num_layers=1), 1, system).ledger
    in_layer = [each for each in ledger.timeline if each.moment.module.startswith("model.layers.")]
    return max(each.total - each.bytes["weights"] for each in in_layer) / shape.tokens

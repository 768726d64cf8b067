"""Test cases of the rotary kernel, forward and backward, run by judge.py.

Legend: B batch, s tokens, h query heads, g key heads, D head dim, W entries of a token in cos and sin.
"""

from dataclasses import dataclass

import torch

from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Verdict, errors_of

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32

# Llama 3 8B; GLM-4 (interleaved, half a head); gpt-oss (shared, 64 heads); Phi-4-mini (96 of 128); unaligned sizes.
COMPILED = (
    ("bf16, 32 + 8 heads of 128", (32, 8, 128, 128, _BF16, False, False)),
    ("fp32, 32 + 8 heads of 128, back", (32, 8, 128, 128, _FP32, False, False, True)),
    ("bf16, 32 + 2 heads of 128, 64 interleaved, back", (32, 2, 128, 64, _BF16, True, True, True)),
    ("bf16, 64 + 8 heads of 64, shared", (64, 8, 64, 64, _BF16, False, True)),
    ("fp16, 24 + 8 heads of 128, 96 turned, back", (24, 8, 128, 96, _FP16, False, False, True)),
    ("bf16, 128 + 8 heads of 256, back", (128, 8, 256, 256, _BF16, False, False, True)),
    ("bf16, 7 + 1 heads of 50, 18 turned", (7, 1, 50, 18, _BF16, False, False)),
)


@dataclass(frozen=True)
class Case:
    """One launch in each direction."""

    B: int
    s: int
    h: int
    g: int
    D: int
    rotary: int
    dtype: torch.dtype
    interleaved: bool = False
    shared: bool = False
    one_table: bool = False
    """True if one table serves all batches."""
    packed: bool = False
    """True if q and k are slices of one tensor, with NaN between them."""
    tables: torch.dtype = torch.float32


CASES = (
    Case(1, 5, 32, 8, 128, 128, _BF16, tables=_BF16),
    Case(2, 3, 7, 1, 50, 18, _FP32, packed=True),
    Case(2, 3, 9, 3, 64, 64, _FP16, interleaved=True, one_table=True, packed=True),
    Case(1, 4, 6, 2, 80, 40, _BF16, interleaved=True, shared=True, tables=_BF16),
    Case(2, 4, 16, 2, 64, 64, _FP32, shared=True),
)


def title(case: Case) -> str:
    """Describe a case."""
    words = [f"[{case.B}, {case.s}, {case.h} + {case.g}, {case.D}] {str(case.dtype).removeprefix('torch.')}"]
    words += [f"{case.rotary} turned"] * (case.rotary < case.D)
    words += [name for name in ("interleaved", "shared", "packed") if getattr(case, name)]
    return ", ".join(words)


def launch(
    h: int, g: int, D: int, rotary: int, dtype: torch.dtype, interleaved: bool, shared: bool, inverse: bool = False
) -> None:
    """Launch the kernel of a forward or a backward on meta tensors."""
    from deepspeed_alst.kernels import rope_ops
    from deepspeed_alst.kernels.registry import registered

    assert registered()["rope"].reference is rope_ops.rope_reference
    q_BshD, k_BsgD = (torch.empty(1, 523, heads, D, dtype=dtype, device="meta") for heads in (h, g))
    cos_BsW = torch.empty(1, 523, rotary, dtype=dtype, device="meta")
    registered()["rope"].launch(q_BshD, k_BsgD, cos_BsW, cos_BsW, rotary, interleaved, shared, inverse)


def judge(case: Case) -> Verdict:
    """Run one forward and one backward in the interpreter and compare with fp64."""
    with faithful() as traffic:
        errors = errors_in(case)
    elements = case.B * case.s * (case.h + case.g) * case.D
    used = case.rotary // 2 if case.shared else case.rotary
    tables = 2 * case.B * case.s * used * case.tables.itemsize
    least = 2 * (2 * elements * case.dtype.itemsize + tables)
    return Verdict(errors, (traffic.read + traffic.written) / elements, least / elements)


def errors_in(case: Case) -> dict[str, tuple[float, float]]:
    """Return the errors of a case's results on this backend, with their limits."""
    from deepspeed_alst.kernels.rope import rope
    from deepspeed_alst.kernels.rope_ops import rope_reference

    torch.manual_seed(0)
    q_BshD, k_BsgD = _queries_and_keys(case)
    dq_BshD, dk_BsgD = (torch.randn(each.shape).to(case.dtype) for each in (q_BshD, k_BsgD))
    W = case.rotary // 2 if case.shared else case.rotary
    cos_BsW, sin_BsW = torch.randn(2, 1 if case.one_table else case.B, case.s, W).to(case.tables)
    how = case.rotary, case.interleaved, case.shared
    results = {}
    for name, dtype in (("truth", torch.float64), ("torch", case.dtype)):
        tables = [each.to(dtype) if dtype == torch.float64 else each for each in (cos_BsW, sin_BsW)]
        results[name] = (
            *rope_reference(q_BshD.to(dtype), k_BsgD.to(dtype), *tables, *how),
            *rope_reference(dq_BshD.to(dtype), dk_BsgD.to(dtype), *tables, *how, inverse=True),
        )
    leaves = q_BshD.detach().requires_grad_(), k_BsgD.detach().requires_grad_()
    # Heads before tokens, as in transformers, which is also the layout of attention's gradient.
    turned = rope(*leaves, cos_BsW, sin_BsW, *how)
    grads = torch.autograd.grad(
        turned, leaves, [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (dq_BshD, dk_BsgD)]
    )
    got = [*(each.detach() for each in turned), *grads]
    return errors_of(("q", "k", "dq", "dk"), got, results["torch"], results["truth"])


def _queries_and_keys(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    if not case.packed:
        return tuple(torch.randn(case.B, case.s, heads, case.D).to(case.dtype) for heads in (case.h, case.g))
    packed = torch.full((case.B, case.s, case.h + case.g + 2, case.D), torch.nan, dtype=case.dtype)
    q_BshD, k_BsgD = packed[:, :, : case.h], packed[:, :, case.h + 1 : case.h + 1 + case.g]
    for each in (q_BshD, k_BsgD):
        each.copy_(torch.randn(each.shape))
    return q_BshD, k_BsgD

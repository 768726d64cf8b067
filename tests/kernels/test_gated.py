"""The gated activation: its kernels by Triton's interpreter on CPU in a process of their own.

Not shown here: how a GPU rounds exp; nothing here ran on one.
"""

import contextlib
import itertools

import pytest
import torch

from benchmarks.kernels.gated import CASES, Case, judge
from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Interpreted

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
GRID = [
    Case(t, F, dtype, activation, backward, layout, gap)
    for dtype, activation, backward in itertools.product(DTYPES, ACTIVATIONS, (False, True))
    for t, F, layout, gap in ((17, 63, "apart", 5), (2, 1000, "fused", 0), (1, 4097, "turned", 3))
]


@pytest.fixture(scope="module")
def interpreted():
    process = Interpreted()
    yield process
    process.close()


# --- against fp64, by the error of torch in the same dtype


@pytest.mark.parametrize("case", GRID, ids=str)
def test_activation_and_gradients_are_as_good_as_torchs(interpreted, case):
    verdict = interpreted.run(judge, case)
    assert verdict.is_accurate, verdict.errors


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bytes_that_a_launch_moves_are_at_most_1_1_times_the_least(interpreted, case):
    verdict = interpreted.run(judge, case)
    assert verdict.is_lean and verdict.is_accurate, verdict
    assert verdict.least == (6 if case.backward else 3) * case.dtype.itemsize


def _tail() -> float:
    """The largest relative error of gelu in fp32 where it is nearly 0."""
    from deepspeed_alst.kernels.gated import gated_activation_

    x_tF = torch.linspace(-6, -1, 1000)[None]
    found_tF, one_tF = x_tF.clone(), torch.ones_like(x_tF)
    with faithful():
        gated_activation_(found_tF, one_tF, "gelu")
    truth_tF = x_tF.double() * torch.special.ndtr(x_tF.double())
    return float(((found_tF - truth_tF) / truth_tF).abs().max())


def test_gelu_keeps_the_digits_of_its_lower_tail(interpreted):
    # torch's 1 + erf has none left at -6.
    assert interpreted.run(_tail) < 3e-6


# --- what is at the edges


def _edges() -> None:
    from deepspeed_alst.kernels.gated import gated_activation_, gated_gradients_

    for activation, dtype in itertools.product(ACTIVATIONS, DTYPES):
        for shape in ((0, 5), (3, 0), (0, 0)):
            with faithful() as traffic:
                gated_gradients_(*torch.zeros(3, *shape, dtype=dtype), activation)
                gated_activation_(*torch.zeros(2, *shape, dtype=dtype), activation)
            assert traffic.read == traffic.written == 0
        large = torch.finfo(dtype).max
        gate = torch.tensor([[0.0, 30, -30, 300, -300, large, -large, torch.inf, -torch.inf, torch.nan]], dtype=dtype)
        other = torch.ones_like(gate)
        wanted, slope = gate.clone(), (gate > 0).to(dtype)
        wanted[gate < 0], slope[0, 0] = 0, 0.5
        value, up, act = gate.clone(), other.clone(), other.clone()
        with faithful():
            gated_activation_(value, up, activation)
            gated_gradients_(gate, up, act, activation)
        for found, expected in ((value, wanted), (act, wanted), (up, wanted), (gate[:, :9], slope[:, :9])):
            torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-10, rtol=1e-6)
        assert gate[0, 9].isnan()


def test_empty_tensors_and_the_largest_numbers_and_none(interpreted):
    interpreted.run(_edges)


def _rows_beyond_int32() -> None:
    from deepspeed_alst.kernels.gated import gated_gradients_, gated_gradients_reference

    torch.manual_seed(0)
    # Memory that nothing touches is not taken: three rows, the last of them 2**31 + 16 elements in.
    far = [torch.empty(2**31 + 100, dtype=torch.bfloat16).as_strided((3, 40), (2**30 + 8, 1)) for _ in range(3)]
    near = [each.copy_(torch.randn(3, 40)).clone() for each in far]
    with faithful():
        gated_gradients_(*far, "gelu")
    gated_gradients_reference(*near, 1)
    for one, other in zip(far, near, strict=True):
        torch.testing.assert_close(one.clone(), other)


def test_rows_may_begin_beyond_2_to_the_31_elements(interpreted):
    interpreted.run(_rows_beyond_int32)


def _opcheck() -> None:
    from deepspeed_alst.kernels.registry import OPS

    three = torch.randn(3, 4, 70)
    for kind in range(3):
        torch.library.opcheck(OPS["gated_activation"].op, (*three[:2], kind))
        torch.library.opcheck(OPS["gated_gradients"].op, (*three, kind))


def test_the_ops_tell_torch_the_truth_about_their_schema_and_their_fake(interpreted):
    interpreted.run(_opcheck)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the kernels are not run on one")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_they_are_as_good_as_torch(case):
    verdict = judge(case, contextlib.nullcontext, "cuda")
    assert verdict.is_accurate, verdict.errors

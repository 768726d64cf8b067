"""RMSNorm and rotary embedding by this package's ops: on CPU in torch, as kernels by Triton's interpreter.

Nothing here ran on a GPU.
"""

import dataclasses
from unittest import mock

import pytest
import torch

from benchmarks.kernels import rms_norm as norms
from benchmarks.kernels import rope as ropes
from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Interpreted
from deepspeed_alst.errors import ShapeError
from deepspeed_alst.kernels import rms_norm as norm_ops
from deepspeed_alst.kernels.registry import has_kernel, registered
from deepspeed_alst.kernels.rms_norm import rms_norm
from deepspeed_alst.kernels.rms_norm_ops import rms_norm_backward_reference, rms_norm_reference
from deepspeed_alst.kernels.rope import rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NORM_CASES = [
    norms.Case(T, H, dtype, cast_first, offset, gap=gap)
    for dtype in DTYPES
    for T, H, cast_first, offset, gap in (
        (67, 65, True, 0.0, 3),
        (40, 128, False, 1.0, 0),
        (7, 2880, False, 0.0, 5),
        (5, 9000, True, 1.0, 0),
    )
] + [
    norms.Case(67, 96, torch.bfloat16, weighs=False),
    norms.Case(67, 96, torch.bfloat16, weight_gradient=False),
    norms.Case(90, 1, torch.float32),
    norms.Case(90, 33, torch.bfloat16, size=1e-4),
    norms.Case(1, 3000, torch.float16),
]
ROPE_CASES = [dataclasses.replace(case, dtype=dtype) for case in ropes.CASES for dtype in DTYPES]


@pytest.fixture(scope="module")
def interpreted():
    process = Interpreted()
    yield process
    process.close()


def _all_fit(errors):
    return all(error <= most for error, most in errors.values())


# --- against fp64, by the error of torch in the same dtype


@pytest.mark.parametrize("case", NORM_CASES, ids=norms.title)
def test_a_norm_and_its_gradients_are_as_good_as_torchs_in_the_interpreter(interpreted, case):
    verdict = interpreted.run(norms.judge, case)
    assert verdict.is_accurate, verdict.errors


@pytest.mark.parametrize("case", ROPE_CASES, ids=ropes.title)
def test_a_rotation_and_its_gradients_are_as_good_as_torchs_in_the_interpreter(interpreted, case):
    verdict = interpreted.run(ropes.judge, case)
    assert verdict.is_accurate and verdict.is_lean, verdict


@pytest.mark.parametrize(
    ("judge", "case"),
    [(norms, case) for case in NORM_CASES] + [(ropes, case) for case in ROPE_CASES],
    ids=lambda each: getattr(each, "__name__", "")[-4:] or str(each)[:60],
)
def test_on_cpu_both_are_as_good_as_torchs(judge, case):
    assert _all_fit(judge.errors_in(case))


def test_on_cpu_no_kernel_runs():
    assert not any(has_kernel(name, torch.device("cpu")) for name in ("rms_norm", "rms_norm_backward", "rope"))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("weighs", [False, True])
def test_the_gradients_in_closed_form_are_those_of_autograd(offset, weighs):
    x_TH, dy_TH, weight_H = (torch.randn(*shape, dtype=torch.float64) for shape in ((7, 33), (7, 33), (33,)))
    leaves = [each.requires_grad_() for each in ((x_TH, weight_H) if weighs else (x_TH,))]
    y_TH = rms_norm_reference(x_TH, weight_H if weighs else None, 1e-2, offset)
    expected = torch.autograd.grad(y_TH, leaves, dy_TH)
    found = rms_norm_backward_reference(dy_TH, x_TH, weight_H if weighs else None, 1e-2, offset)
    for pair in zip(found, expected, strict=False):
        torch.testing.assert_close(*pair, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        norms.Case(67, 128, torch.bfloat16, cast_first=True),
        norms.Case(33, 4096, torch.bfloat16),
        norms.Case(33, 2880, torch.float32, offset=1.0),
        norms.Case(17, 9000, torch.bfloat16),
    ],
    ids=norms.title,
)
def test_the_bytes_that_a_norms_launches_move_are_at_most_1_1_times_the_least(interpreted, case):
    verdict = interpreted.run(norms.judge, case)
    assert verdict.is_lean, verdict


def test_the_yardstick_sees_what_a_wrong_norm_would_do():
    right = norm_ops.rms_norm
    for wrong in (lambda y: 1.001 * y, lambda y: y + 1e-4):
        with mock.patch.object(norm_ops, "rms_norm", lambda *args, wrong=wrong, **kw: wrong(right(*args, **kw))):
            assert not _all_fit(norms.errors_in(norms.Case(40, 128, torch.float32)))


# --- what is at the edges


def _edges() -> None:
    weight_H = torch.randn(5).requires_grad_()
    none_TH = torch.randn(0, 5).requires_grad_()
    y_TH = rms_norm(none_TH, weight_H, 1e-6)
    y_TH.sum().backward()
    assert y_TH.shape == (0, 5) and none_TH.grad.shape == (0, 5) and not weight_H.grad.any()
    zero_TH = torch.zeros(3, 5).requires_grad_()
    rms_norm(zero_TH, weight_H, 1e-6).backward(torch.ones(3, 5))
    torch.testing.assert_close(zero_TH.grad, 1e3 * weight_H.detach().expand(3, 5))
    for dtype, size in ((torch.bfloat16, 1e15), (torch.bfloat16, 1e30), (torch.float16, 1e4), (torch.float32, 1e15)):
        huge_TH = (size * torch.randn(4, 5)).to(dtype)
        got, same = rms_norm(huge_TH, None, 1e-6), rms_norm_reference(huge_TH, None, 1e-6)
        torch.testing.assert_close(got, same)
    q_BshD = torch.randn(2, 0, 3, 8).requires_grad_()
    turned = rope(q_BshD, torch.randn(2, 0, 1, 8), torch.randn(1, 0, 8), torch.randn(1, 0, 8), 8)
    assert [each.shape for each in turned] == [(2, 0, 3, 8), (2, 0, 1, 8)]
    turned[0].sum().backward()
    assert q_BshD.grad.shape == (2, 0, 3, 8)
    alone, _ = rope(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 2), torch.ones(1, 1, 2), 2)
    assert alone.flatten().tolist() == [-1.0, 1.0]  # a quarter of a turn


def _edges_in_the_interpreter() -> None:
    with faithful():
        _edges()


def test_no_rows_zero_rows_huge_rows_and_one_pair(interpreted):
    _edges()
    interpreted.run(_edges_in_the_interpreter)


@pytest.mark.parametrize(
    ("x", "weight", "options", "words"),
    [
        (torch.zeros(2, 0), torch.zeros(0), {}, "H >= 1"),
        (torch.zeros(2, 3, dtype=torch.float64), None, {}, "must be one of"),
        (torch.zeros(2, 3), torch.zeros(4), {}, "weight must be .H."),
        (torch.zeros(2, 3), torch.zeros(3, device="meta"), {}, "on x's device"),
        (torch.zeros(2, 3).half(), torch.zeros(3), {"cast_first": True}, "must be the weight's"),
    ],
)
def test_rows_and_a_weight_that_do_not_fit_are_refused(x, weight, options, words):
    with pytest.raises(ShapeError, match=words):
        rms_norm(x, weight, 1e-6, **options)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"k": torch.zeros(1, 4, 2, 8)}, "same B, s and D"),
        ({"rotary": 7}, "even"),
        ({"rotary": 10}, "at most D"),
        ({"cos": torch.zeros(3, 5, 8), "sin": torch.zeros(3, 5, 8)}, "B or 1"),
        ({"cos": torch.zeros(1, 5, 4), "sin": torch.zeros(1, 5, 4)}, "too few entries"),
        ({"q": torch.zeros(1, 5, 3, 8).half()}, "of one dtype"),
        ({"cos": torch.zeros(1, 5, 8).requires_grad_()}, "need no gradient"),
        ({"sin": torch.zeros(1, 5, 8, device="meta")}, "on one device"),
    ],
)
def test_heads_and_tables_that_do_not_fit_are_refused(changed, words):
    given = {"q": torch.zeros(1, 5, 3, 8), "k": torch.zeros(1, 5, 2, 8), "rotary": 8}
    given |= {name: torch.zeros(1, 5, 8) for name in ("cos", "sin")} | changed
    with pytest.raises(ShapeError, match=words):
        rope(*(given[name] for name in ("q", "k", "cos", "sin", "rotary")))


def _opcheck() -> None:
    for name in ("rms_norm", "rms_norm_backward", "rope"):
        op = registered()[name]
        torch.library.opcheck(op.op, op.example(torch.device("cpu")))


def test_the_ops_tell_torch_the_truth_about_their_schemas_and_fakes(interpreted):
    _opcheck()
    interpreted.run(_opcheck)


# --- memory


def _kept_storages(function, *args):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        result = function(*args)
    return result, {each.untyped_storage().data_ptr() for each in kept}


def test_a_norm_keeps_its_input_and_its_weight_alone_and_lies_as_the_input_does():
    weight_H = torch.randn(8).requires_grad_()
    tokens_first = torch.randn(2, 5, 3, 8).requires_grad_()
    packed = torch.randn(2, 5, 3, 2, 8).requires_grad_()
    for x in (tokens_first, tokens_first.transpose(1, 2), packed[:, :, :, 0], packed[..., 1, :].transpose(1, 2)):
        y, kept = _kept_storages(rms_norm, x, weight_H, 1e-6)
        assert kept == {x.untyped_storage().data_ptr(), weight_H.untyped_storage().data_ptr()}
        torch.testing.assert_close(y, rms_norm_reference(x, weight_H, 1e-6))
        assert y.stride() == torch.empty_like(x).stride()


def test_a_rotation_keeps_its_tables_alone():
    q, k = torch.randn(1, 5, 3, 8).requires_grad_(), torch.randn(1, 5, 2, 8).requires_grad_()
    cos, sin = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    (to_q, _), kept = _kept_storages(rope, q, k, cos, sin, 8)
    assert kept == {each.untyped_storage().data_ptr() for each in (cos, sin)}
    assert to_q.is_contiguous()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the kernels are not run on one")
@pytest.mark.parametrize("judge", [norms, ropes])
def test_on_a_gpu_they_are_as_good_as_torch(judge):
    with torch.device("cuda"):
        for case in judge.CASES:
            assert _all_fit(judge.errors_in(case))

"""Two functions are equivalent where outputs and gradients agree within roundings, and nowhere else."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from deepspeed_alst.core.selfcheck import is_equivalent, random_tensors, result_or_none, run_isolated


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2.001


def inputs(dtype=torch.float32):
    return (random_tensors()(7, 33).to(dtype).requires_grad_(),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_roundings_are_forgiven(dtype):
    assert is_equivalent(lambda x: (x * 3) / 3, lambda x: x * 1, inputs(dtype))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2.001,
        lambda x: _WrongGradient.apply(x),
        lambda x: (x * 2).double(),
        lambda x: (x * 2)[:-1],
        lambda x: (x * 2, x),
        lambda x: x * float("nan"),
    ],
)
def test_another_value_gradient_dtype_shape_or_number_of_outputs_is_not(function):
    assert not is_equivalent(function, lambda x: x * 2, inputs())


def test_inputs_are_not_changed():
    (x,) = inputs()
    before = x.detach().clone()
    is_equivalent(lambda x: x.mul(1).add_(1), lambda x: x + 1, (x,))
    assert torch.equal(x, before) and x.grad is None


def test_a_check_runs_out_of_reach_of_the_callers_modes():
    with FakeTensorMode(), torch.no_grad():
        assert run_isolated(is_equivalent, lambda x: x * 2, lambda x: x + x, inputs_outside())


def inputs_outside():
    return run_isolated(inputs)


def test_code_that_cannot_run_is_no_result_and_draws_nothing():
    state = torch.get_rng_state()
    assert result_or_none(lambda: torch.rand(3)[7]) is None
    assert result_or_none(lambda: len(torch.rand(3))) == 3
    assert torch.equal(torch.get_rng_state(), state)

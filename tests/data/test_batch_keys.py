"""The batch numbers of a ds_config under sequence parallelism: DeepSpeed's arithmetic, and the way out."""

import itertools
from types import SimpleNamespace
from unittest import mock

import pytest

from deepspeed_alst.config.compatibility import GAS, MICRO, TOTAL, check_batch_keys
from deepspeed_alst.errors import ConfigError
from deepspeed_alst.report import describe_step

P, WORLD = 2, 4


def refusal(numbers: dict) -> str:
    try:
        check_batch_keys(numbers, P, WORLD)
    except ConfigError as error:
        return str(error)
    return ""


def deepspeed_refuses(numbers: dict) -> bool:
    from deepspeed.runtime import config

    # Two replicas, as this package tells DeepSpeed.
    with mock.patch.object(config.dist, "get_rank", lambda: 0):
        try:
            config.DeepSpeedConfig(numbers, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: WORLD // P))
        except AssertionError:
            return True
    return False


def test_numbers_are_refused_exactly_where_deepspeed_refuses_them():
    choices = [(None, 1, 2, 4, 6, 8), (None, 1, 2, 3), (None, 1, 2, 4)]
    grid = [
        {name: value for name, value in zip((TOTAL, MICRO, GAS), values, strict=True) if value is not None}
        for values in itertools.product(*choices)
    ]
    refused = [numbers for numbers in grid if refusal(numbers)]
    assert refused == [numbers for numbers in grid if deepspeed_refuses(numbers)]
    assert 10 < len(refused) < len(grid) - 10


def test_what_fits_without_sequence_parallelism_is_told_the_number_that_keeps_its_samples():
    words = refusal({TOTAL: 16, MICRO: 2, GAS: 2})
    assert "train_batch_size=16 is not train_micro_batch_size_per_gpu=2 x gradient_accumulation_steps=2 x 2" in words
    assert "sequence_parallel_size=2" in words and "the batches of a replica's 2 ranks take 2 micro-steps" in words
    assert "gradient_accumulation_steps to 4, which keeps the samples per step, or train_batch_size to 8." in words
    assert not refusal({TOTAL: 16, MICRO: 2, GAS: 4}) and not refusal({TOTAL: 8, MICRO: 2, GAS: 2})


def test_a_total_that_no_accumulation_gives_is_told_another_total():
    assert refusal({TOTAL: 6, MICRO: 2, GAS: 1}).endswith("Set train_batch_size to 4.")
    assert refusal({TOTAL: 1}).endswith("Set train_batch_size to a multiple of 2.")


@pytest.mark.parametrize("value", ["auto", "8", True, 0, -1, 1.5, [8]])
@pytest.mark.parametrize("name", [TOTAL, MICRO, GAS])
def test_what_is_no_number_is_named(name, value):
    assert refusal({TOTAL: 8, MICRO: 2, name: value}).startswith(f"{name}: must be a positive whole number")


def test_a_step_is_told_in_samples_and_micro_steps():
    words = describe_step(micro=2, accumulation=4, sp_size=2, replicas=3)
    assert words == "24 samples: 4 micro-steps of 2 sample(s) on 3 replica(s); at SP 1 they would be 48 samples"
    assert "is not a multiple of sequence_parallel_size=2" in describe_step(2, 3, 2, 1)

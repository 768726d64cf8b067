"""The tiles benchmark's cheap parts: figures of a small model for real, and of an 8B model's loss on fake tensors."""

import pytest

from benchmarks.tiles.loss import FAKE, SMALL, peak_beyond_weights, run
from benchmarks.tiles.real import gradient_errors
from benchmarks.tiles.shapes import BASELINE, SCALED, SYSTEMS, measure


def test_a_layer_in_tiles_has_two_mlp_forwards_and_deepspeeds_three():
    _, upstream, ours = SYSTEMS
    whole, theirs, own = (measure(SCALED[0], 1, each) for each in (BASELINE, upstream, ours))
    assert whole.forwards == (1, 1) and own.forwards == (2, 1) and theirs.forwards == (3, 3)
    assert 1.2 < own.layer_flops / whole.layer_flops <= 1.25 < 1.55 < theirs.layer_flops / whole.layer_flops


def test_gradients_in_many_tiles_are_as_good_as_in_one():
    errors = gradient_errors((1, 64))
    assert errors["ours"][1] < 1.2 * errors["ours"][0] < errors["upstream"][1]


@pytest.mark.parametrize("case", [FAKE, SMALL], ids=lambda case: case.name)
def test_tokens_without_a_label_cost_nothing_in_the_loss(case):
    whole, all_trained, some_trained = (
        run(case, system, trained).ledger for system, trained in (("whole", 1.0), ("ours", 1.0), ("ours", 0.25))
    )
    assert all_trained.matmul_flops == whole.matmul_flops == 4 * some_trained.matmul_flops
    assert peak_beyond_weights(all_trained) < 0.7 * peak_beyond_weights(whole)

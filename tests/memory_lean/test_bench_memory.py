"""The memory benchmark on a small model: what a token adds, and that a layer's sums are freed after its backward."""

from dataclasses import replace

import pytest

from benchmarks.memory import LEAN, ORDINARY, measure, slopes
from benchmarks.tiles.shapes import SCALED

TOKENS = 16384, 32768  # two and four chunks
SMALL = SCALED[0]


def slope(system):
    return slopes(TOKENS, *(measure(SMALL, 2, count, system) for count in TOKENS)).step


@pytest.mark.slow
def test_a_token_takes_less_than_half_with_memory_lean_layers():
    assert 0 < slope(LEAN) < 0.5 * slope(ORDINARY)


@pytest.mark.slow
def test_the_peak_does_not_grow_with_the_layers():
    few, many = (measure(replace(SMALL, num_layers=count), 2, TOKENS[0], LEAN).device for count in (2, 4))
    assert many["backward"] <= 1.01 * few["backward"]

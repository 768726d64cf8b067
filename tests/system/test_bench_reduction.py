"""The reduction benchmark's cheap part: bytes on the wire and bits on two ranks, for every ZeRO stage."""

import pytest

from benchmarks.reduction.__main__ import SMALL
from benchmarks.reduction.engines import BASELINE, OURS, cases
from benchmarks.reduction.measure import extra_bytes, traffic, wire_bytes


@pytest.mark.parametrize(
    "case",
    [
        # Of each stage one; gradients of ZeRO 2 alone are sent in two ways.
        pytest.param(each, marks=[pytest.mark.slow] * (each.stage in (1, 3) and each.accumulation == "fp32"))
        for each in cases((2,), (1,), **SMALL)
    ],
    ids=lambda case: case.name,
)
def test_fp32_sums_are_deepspeeds_for_half_the_bytes(case, ranks2):
    found = ranks2.run(traffic, case)
    assert all(of_rank[OURS].num_different == 0 for of_rank in found)
    ours, theirs = (wire_bytes([of_rank[name].collectives for of_rank in found]) for name in (OURS, BASELINE))
    # Under ZeRO 2 the sums go on to their owners in fp32.
    most = {(2, "fp32"): 0.75}.get((case.stage, case.accumulation), 0.5)
    assert 0.4 * theirs < ours < (most + 0.001) * theirs


@pytest.mark.parametrize("stage", [0, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 2)), 3])
def test_it_needs_two_slices_however_large_the_bucket(stage, ranks2):
    for bucket in (SMALL["bucket"], 3 * SMALL["bucket"]):
        (case,) = (
            each
            for each in cases((2,), (2,), **{**SMALL, "bucket": bucket})
            if each.stage == stage and each.accumulation == "bf16"
        )
        most = max(of_rank[OURS] for of_rank in ranks2.run(extra_bytes, case))
        assert SMALL["slice_bytes"] < most <= 2 * SMALL["slice_bytes"] + 256

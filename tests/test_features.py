"""Each feature of DeepSpeed that the compatibility table calls right, trained and compared with SP 1."""

import pytest

from benchmarks.cells import Cell
from benchmarks.parity import measure
from deepspeed_alst.compatibility import FEATURES

_ZERO3 = {"stage": 3, "reduce_bucket_size": 2000, "stage3_param_persistence_threshold": 0}

CELLS = {
    "fp16": Cell(stage=2, dtype="fp16", gas=2, clip=0.5),
    "bf16": Cell(stage=1, dtype="bf16", odd_lengths=True),
    "gradient clipping": Cell(stage=3, gas=2, clip=0.5),
    "optimizer offload to CPU": Cell(stage=2, offload_optimizer=True, gas=2),
    "parameter offload to CPU": Cell(
        stage=3, gas=2, extra=(("zero_optimization", {**_ZERO3, "offload_param": {"device": "cpu"}}),)
    ),
    "reduce_scatter off": Cell(stage=3, reduce_scatter=False, gas=2),
    "contiguous_gradients off": Cell(stage=2, contiguous_gradients=False),
    "overlap_comm": Cell(stage=2, overlap_comm=True, gas=2),
    "fp32 gradient accumulation": Cell(stage=1, dtype="bf16", grad_accum="fp32", gas=2),
}


def test_every_right_row_has_a_cell():
    assert set(CELLS) == {feature.name for feature in FEATURES if not feature.refusal}


@pytest.mark.parametrize("name", CELLS)
def test_a_right_row_is_right(name, ranks2):
    cell = CELLS[name]
    if cell.dtype == "fp16":
        ranks2.run(allow_fp16_on_cpu)
    row = measure(cell, ranks2, with_upstream=False)
    assert not isinstance(row.sp1, str), row.sp1
    assert not row.problems()


def allow_fp16_on_cpu():
    """DeepSpeed refuses fp16 on CPU for its speed; the arithmetic is there."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True

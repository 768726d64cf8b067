"""Which elements travel in which slice: integers only."""

import pytest

from deepspeed_alst.grad_reduction.reduce import segments


@pytest.mark.parametrize("columns", [[], [0], [1], [7], [3, 0, 11, 1, 1], [100]])
@pytest.mark.parametrize("width", [1, 4, 1000])
def test_every_column_is_in_one_slice_in_order_and_no_slice_is_too_wide(columns, width):
    slices = list(segments(columns, width))
    assert all(sum(part.width for part in parts) == width for parts in slices[:-1])
    for parts in slices:
        assert 0 < parts[-1].at + parts[-1].width <= width
        assert [part.at for part in parts] == [sum(before.width for before in parts[:i]) for i in range(len(parts))]
    seen = [(part.index, column) for parts in slices for part in parts for column in range(part.start, part.stop)]
    assert seen == [(index, column) for index, number in enumerate(columns) for column in range(number)]

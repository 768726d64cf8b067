"""Which elements travel in which slice, and to whom: integers only."""

import pytest

from deepspeed_alst.grad_reduction.bucket_layout import pieces_by_owner, segments


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


@pytest.mark.parametrize("start, stop", [(0, 20), (0, 1), (3, 17), (19, 20), (5, 5)])
def test_the_pieces_of_all_owners_are_the_range_and_each_lies_in_its_owners_fragment(start, stop):
    bounds, owners = [0, 4, 5, 12, 12, 20], [1, 0, 2, 0, 1]
    owned = pieces_by_owner(bounds, owners, start, stop, 4)
    assert owned[3] == []
    for owner, pieces in enumerate(owned):
        for piece in pieces:
            assert owners[piece.fragment] == owner
            assert bounds[piece.fragment] <= piece.start < piece.stop <= bounds[piece.fragment + 1]
    elements = sorted(element for pieces in owned for piece in pieces for element in range(piece.start, piece.stop))
    assert elements == list(range(start, stop))

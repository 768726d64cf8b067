"""Which elements travel in which slice, and to whom: integers only."""

import pytest

from deepspeed_alst.grad_reduction.reduce import pieces_by_owner, segments


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


@pytest.mark.parametrize("width", [1, 3, 14, 20])
def test_the_pieces_of_all_owners_are_the_slice_and_each_lies_in_its_owners_fragment(width):
    sizes, owners, ranks = [4, 1, 7, 0, 8], [1, 0, 2, 0, 1], 4
    for parts in segments(sizes, width):
        share = -(-sum(part.width for part in parts) // ranks)
        owned = pieces_by_owner(parts, owners, share, ranks)
        elements = {}
        for rank, of_rank in enumerate(owned):
            assert of_rank[3] == []
            for owner, pieces in enumerate(of_rank):
                for piece in pieces:
                    assert owners[piece.index] == owner and piece.at + piece.width <= share
                    elements |= {
                        rank * share + piece.at + i: (piece.index, piece.start + i) for i in range(piece.width)
                    }
        expected = [(part.index, element) for part in parts for element in range(part.start, part.stop)]
        assert [elements[at] for at in sorted(elements)] == expected and sorted(elements) == list(range(len(expected)))

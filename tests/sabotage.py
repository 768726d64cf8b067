"""A reduction that averages by another number, for tests of what must notice it."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from deepspeed_alst.grad_reduction import reduce as reduction


@contextmanager
def twice_the_average(wanted: bool = True) -> Iterator[None]:
    """Inside, gradients come out twice as large as they should."""
    right = reduction.sum_pieces

    def wrong(pieces_Pn, out_n, scale, *accumulate):
        right(pieces_Pn, out_n, 2 * scale, *accumulate)

    with mock.patch.object(reduction, "sum_pieces", wrong if wanted else right):
        yield

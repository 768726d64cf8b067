"""The short form of `make parity`: loss, gradients, norm and weights against fp64, beside the run at SP 1."""

import functools
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.cells import Cell
from benchmarks.grid import grid_cells, lean_cells, short_cells, uneven_cells
from benchmarks.parity import measure, missed, repeated


def quick(cells: list[Cell], slow: Collection[Cell] = ()) -> list[Any]:
    """Cells as parameters, some for the slow tests, none with more micro-steps than show that they add up.

    Two at SP 1 make four at SP 2; four ranks of a sequence accumulate without them.
    """
    return [
        pytest.param(replace(cell, gas=min(cell.gas, 4 // cell.world_size)), marks=[pytest.mark.slow] * (cell in slow))
        for cell in cells
    ]


@pytest.mark.parametrize(
    "cell",
    quick([cell for cell in short_cells() if cell.world_size == 2], lean_cells()[1:]),
    ids=lambda cell: cell.name(),
)
def test_two_ranks_are_as_exact_as_no_sequence_parallelism(cell, ranks2):
    check_parity(cell, ranks2)


@pytest.mark.parametrize(
    "cell", quick([cell for cell in short_cells() if cell.world_size == 4]), ids=lambda cell: cell.name()
)
def test_four_ranks_are_as_exact_as_no_sequence_parallelism(cell, ranks4):
    check_parity(cell, ranks4)


@pytest.mark.parametrize("cell", quick(uneven_cells()[:3], uneven_cells()[1:]), ids=lambda cell: cell.name())
def test_three_ranks_with_unequal_heads_are_as_exact_as_no_sequence_parallelism(cell, ranks3):
    check_parity(cell, ranks3)


@pytest.mark.parametrize("cell", quick(grid_cells()[:2], grid_cells()[1:]), ids=lambda cell: cell.name())
def test_four_ranks_with_fewer_heads_are_as_exact_as_no_sequence_parallelism(cell, ranks4):
    check_parity(cell, ranks4)


def check_parity(cell, ranks):
    """Run a cell with and without sequence parallelism; fail if it misses a bound."""
    row = repeated(functools.partial(measure, with_upstream=False), cell, ranks)
    assert not isinstance(row.sp1, str), row.sp1
    assert not row.problems()


def test_the_bounds_can_be_missed(ranks2):
    """The yardstick itself: half the gradient, as DeepSpeed's own ALST gives it on some paths, is far outside."""
    row = measure(short_cells()[0], ranks2, with_upstream=False)
    wrong = replace(row.alst, grads={name: error + 0.5 for name, error in row.alst.grads.items()})
    assert len(missed(wrong, row.sp1)) == len(row.sp1.grads)
    assert missed(replace(row.alst, loss=float("nan")), row.sp1)

    # Where one run missed, what most samples miss counts, and a run that could not be made always does.
    missing = replace(row, alst=wrong)
    assert not replace(missing, others=(row, row)).problems()
    assert len(replace(missing, others=(missing, row)).problems()) >= len(row.sp1.grads)
    assert replace(row, others=(missing, missing)).problems()
    assert replace(row, others=(replace(row, alst="crashed"), row)).problems() == ["crashed"]

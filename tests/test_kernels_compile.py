"""The kernels compiled ahead of time for four chips, by their own wrappers: registers, shared memory, no spills.

Compiled is not run: nothing here says that they are right, or fast, on those chips.
"""

import pytest

from benchmarks.kernels.compile import CROSS_ENTROPY, SHARED, Compiled, compile_all


@pytest.fixture(scope="module")
def table():
    return compile_all()


def test_every_kernel_compiles_for_every_target_at_every_size(table):
    assert [(each.target, each.size) for each in table] == [
        (target, size) for target in SHARED for size, _ in CROSS_ENTROPY
    ]


@pytest.mark.parametrize("target", SHARED)
def test_nothing_is_spilled_and_shared_memory_suffices(table, target, capsys):
    of_target = [each for each in table if each.target == target]
    with capsys.disabled():
        for each in of_target:
            print(
                f"\n{each.kernel}, {target}, {each.size}: {each.registers} registers, {each.shared} B shared, "
                f"{each.spilled} spilled",
                end="",
            )
    assert all(each.fits for each in of_target)
    # A multiprocessor has 65536 registers, and one block of 16 warps takes 512 times a thread's.
    assert max(each.registers for each in of_target) <= 128


def test_a_spill_or_too_much_shared_memory_fails():
    good = Compiled("k", "sm_80", "s", 40, 163 * 1024, 0)
    assert good.fits
    assert not Compiled("k", "sm_80", "s", 40, 163 * 1024 + 1, 0).fits
    assert not Compiled("k", "gfx942", "s", 40, 0, 1).fits

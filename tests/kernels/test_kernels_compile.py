"""The kernels compiled ahead of time for four chips, by their own wrappers: registers, shared memory, no spills.

Compiled is not run: nothing here says that they are right, or fast, on those chips.
"""

import pytest

from benchmarks.kernels.compile import SHARED, Compiled, compile_all
from benchmarks.kernels.judge import subjects

# A minute and a half each; make bench-kernels prints and judges all four chips.
PAIRS = (("sm_90", "gfx942"), ("sm_80", "sm_100"))


@pytest.fixture(scope="module", params=[pytest.param(pair, marks=pytest.mark.slow) for pair in PAIRS], ids=" and ".join)
def table(request):
    return compile_all(request.param)


def targets_of(table):
    return list(dict.fromkeys(each.target for each in table))


def test_the_pairs_are_all_targets():
    assert sorted(PAIRS[0] + PAIRS[1]) == sorted(SHARED)


def test_every_kernel_compiles_for_every_target_at_every_size(table):
    assert [
        (target, size) for target in targets_of(table) for subject in subjects() for size, _ in subject.COMPILED
    ] == list(dict.fromkeys((each.target, each.size) for each in table))


def test_nothing_is_spilled_and_shared_memory_suffices(table, capsys):
    with capsys.disabled():
        for each in table:
            print(
                f"\n{each.kernel}, {each.target}, {each.size}: {each.registers} registers, {each.shared} B shared, "
                f"{each.spilled} spilled",
                end="",
            )
    assert table and all(each.fits for each in table)
    # A multiprocessor has 65536 registers, and one block of 16 warps takes 512 times a thread's.
    assert max(each.registers for each in table) <= 128


def test_no_thread_overwrites_what_another_has_yet_to_read(table):
    # The interpreter runs a row's threads as one, and would not see it. Where rows are read 16 bytes at a time, the one
    # narrow read is the label's logit: before the first barrier, and every write of a gradient comes after the last.
    aligned = [each for each in table if each.size == "bf16, V 128256" and each.accesses]
    assert [each.target for each in aligned] == [each for each in targets_of(table) if each != "gfx942"]
    for each in aligned:
        accesses = each.accesses.split()
        first, last = accesses.index("bar.sync"), len(accesses) - accesses[::-1].index("bar.sync")
        assert accesses.count("ld.global.b16") == 1 and accesses.index("ld.global.b16") < first
        writes = [index for index, access in enumerate(accesses) if access.startswith("st.")]
        assert writes and min(writes) >= last
        assert {access for access in accesses[last + 1 :]} == {"ld.global.v4.b32", "st.global.v4.b32"}


def test_heads_move_16_bytes_at_a_time_where_they_are_aligned(table):
    accesses = {
        (each.target, each.size): set(each.accesses.split())
        for each in table
        if each.kernel == "heads_kernel" and each.accesses
    }
    assert len(accesses) == 5 * len([each for each in targets_of(table) if each != "gfx942"])
    for (_, size), found in accesses.items():
        wide = {"ld.global.v4.b32", "st.global.v4.b32"}
        assert found == wide or ("D 75" in size and not found & wide), (size, found)


def test_a_spill_or_too_much_shared_memory_fails():
    good = Compiled("k", "sm_80", "s", 40, 163 * 1024, 0)
    assert good.fits
    assert not Compiled("k", "sm_80", "s", 40, 163 * 1024 + 1, 0).fits
    assert not Compiled("k", "gfx942", "s", 40, 0, 1).fits

"""The lossless bf16 codec: every bit comes back, whichever implementation packs and whichever unpacks.

*Interpreted*: the Triton kernels, in a process of their own. *Run here*: the definition in torch.
Nothing here ran on a GPU.
"""

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.figures import one_thread
from benchmarks.kernels.bf16 import Case, judge
from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Interpreted
from deepspeed_alst.kernels import bf16_codec as codec
from deepspeed_alst.kernels import pack_bf16 as _registers  # noqa: F401
from deepspeed_alst.kernels import registry

ROOM = codec.ESCAPES  # escapes of one segment


@pytest.fixture(scope="module")
def interpreted():
    process = Interpreted()
    yield process
    process.close()


def bits_of(x):
    return x.bfloat16().view(torch.int16)


def has_overflowed(packed_m):
    return codec.has_overflowed(packed_m[: codec.HEADER], packed_m.numel())


def levels():
    """A segment of ones, every other block of it with 5 levels of outliers: the window to find is the sixth."""
    x_v = torch.ones(2 * codec.BLOCK)
    x_v[:5] = 2.0 ** torch.tensor([60, 50, 40, 30, 20])
    x_v[5:8] = torch.tensor([2.0**-6, 2.0**-7, 0.0])
    return x_v.repeat(codec.SEGMENT // x_v.numel())


def patterns():
    """Bits of all kinds that fit."""
    make = torch.Generator().manual_seed(0)
    # In order, 128 neighbours share an exponent: subnormals, zeros of both signs, infinities, NaNs with their payloads.
    every_n = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    yield "every", every_n
    for n in (1, 63, 64, 65, 1000, 4095, 4096, 4097, 9001):
        yield f"normal {n}", bits_of(torch.randn(n, generator=make))
    sprinkled_n = bits_of(torch.randn(40_000, generator=make))
    sprinkled_n[::31] = every_n[torch.randint(1 << 16, (sprinkled_n[::31].numel(),), generator=make)]
    yield "normal and any", sprinkled_n
    yield "outlier channels", bits_of(Case(30_000, outliers=0.01).values())
    yield "levels", bits_of(levels())
    for value in (0.0, -0.0, 1.0, -torch.inf, torch.nan, 1e-40, 3e38):
        yield f"constant {value}", bits_of(torch.full((130,), value))
    yield "empty", every_n[:0]


def implementations():
    """Functions that pack and unpack bits, by name."""
    yield "reference", codec.pack_reference, codec.unpack_reference
    if registry.runs_on(torch.device("cpu")):
        yield "kernel", registry.OPS["pack_bf16_"].op, registry.OPS["unpack_bf16_"].op


def pack(function, bits_n):
    """Pack into a buffer of garbage, with more behind it that must stay."""
    size = codec.packed_bytes(bits_n.numel())
    frame_m = torch.full((size + 8,), 0xA5, dtype=torch.uint8)
    function(bits_n, frame_m[:size])
    assert (frame_m[size:] == 0xA5).all(), "written beyond the packed values"
    return frame_m[:size]


def unpack(function, packed_m, n):
    frame_n = torch.full((n + 8,), 0x5A5A, dtype=torch.int16)
    function(packed_m, frame_n[:n])
    assert (frame_n[n:] == 0x5A5A).all(), "written beyond the values"
    return frame_n[:n]


def _round_trips(within=nullcontext) -> None:
    with within(), one_thread():  # threads take the places of escapes in any order
        for name, bits_n in patterns():
            given_n, packed = bits_n.clone(), {}
            for by, packs, _ in implementations():
                packed[by] = pack(packs, bits_n)
                assert torch.equal(packed[by], packed["reference"]), f"{name}: {by} packs differently"
            assert torch.equal(bits_n, given_n) and not has_overflowed(packed["reference"]), name
            for by, _, unpacks in implementations():
                assert torch.equal(unpack(unpacks, packed["reference"], bits_n.numel()), bits_n), f"{name}: {by}"


def test_every_implementation_packs_the_same_bytes_and_unpacks_every_bit(interpreted):
    """Run here, and interpreted."""
    _round_trips()
    interpreted.run(_round_trips, faithful)


def _any_order() -> None:
    """Segments that took the places of their escapes in reverse order."""
    segments = [bits_of(Case(codec.SEGMENT, outliers=each).values()) for each in (0.0, 0.01, 0.02)]
    bits_n = torch.cat(segments)
    packed_m = pack(codec.pack_reference, bits_n)
    of, counts = codec._sections(packed_m), [codec.num_escapes(pack(codec.pack_reference, each)) for each in segments]
    parts = list(of.escapes_m[: sum(counts)].split(counts))[::-1]
    of.escapes_m[: sum(counts)] = torch.cat(parts).clone()
    of.starts.copy_(torch.tensor([counts[1] + counts[2], counts[2], 0]))
    for by, _, unpacks in implementations():
        assert torch.equal(unpack(unpacks, packed_m, bits_n.numel()), bits_n), by


def test_escapes_of_segments_may_come_in_any_order(interpreted):
    """Run here, and interpreted."""
    _any_order()
    interpreted.run(_any_order)


def _overflows(within=nullcontext) -> None:
    random_n = torch.randint(-(1 << 15), 1 << 15, (10_001,)).to(torch.int16)
    expected = codec._sections(pack(codec.pack_reference, random_n))
    for by, packs, unpacks in implementations():
        with within():  # the interpreter stops at accesses beyond the tensors
            for num_escapes, fits in ((ROOM, True), (ROOM + 1, False)):
                x_n = torch.ones(codec.SEGMENT)
                x_n[torch.arange(num_escapes) * 15] = 2.0**100  # at most 5 of a block
                packed_m = pack(packs, bits_of(x_n))
                assert codec.num_escapes(packed_m) == num_escapes and has_overflowed(packed_m) != fits, by
                back_n = unpack(unpacks, packed_m, codec.SEGMENT)
                assert not fits or torch.equal(back_n, bits_of(x_n)), by
            packed_m = pack(packs, random_n)
            assert has_overflowed(packed_m), by
            for name in ("mantissas_n", "low_g", "first_b"):
                assert torch.equal(getattr(codec._sections(packed_m), name), getattr(expected, name)), f"{by}: {name}"
            unpack(unpacks, packed_m, random_n.numel())
            packed_m.fill_(0x7F)  # never packed: escapes begin beyond all tensors
            unpack(unpacks, packed_m, random_n.numel())


def test_too_many_escapes_are_counted_and_touch_nothing_else(interpreted):
    """Run here, and interpreted."""
    _overflows()
    interpreted.run(_overflows, faithful)


def test_outliers_are_escapes_and_do_not_move_the_window():
    packed_m = pack(codec.pack_reference, bits_of(levels()))
    # Of the smaller ones, 2**-6 fits in a window that ends at 1.
    assert codec.num_escapes(packed_m) == 7 * codec.SEGMENT // (2 * codec.BLOCK)


def test_a_packed_value_takes_11_64_bits_however_many_escapes_there_are():
    for x_n in (torch.zeros(1 << 20), torch.randn(1 << 20)):
        assert codec.packed_bytes(x_n.numel()) * 8 / x_n.numel() == pytest.approx(11.64, abs=0.01)
        assert not has_overflowed(pack(codec.pack_reference, bits_of(x_n)))


@pytest.mark.parametrize("case", [Case(20_000), Case(8191, outliers=0.01)], ids=str)
def test_the_kernels_move_each_byte_once(interpreted, case):
    """Interpreted. Bytes of all loads and stores, beside the least."""
    verdict = interpreted.run(judge, case)
    assert verdict.is_accurate and verdict.is_lean, verdict


def _beyond_int32() -> None:
    # Memory that nothing touches is not taken; of the programs, only the last two run.
    from triton.runtime import interpreter

    n = 2**31 + 5000
    far_n, back_n = (torch.empty(n, dtype=torch.int16) for _ in range(2))
    near_n = far_n[-codec.SEGMENT :].copy_(bits_of(torch.randn(codec.SEGMENT)))
    packed_m = torch.empty(codec.packed_bytes(n), dtype=torch.uint8)
    last_two = lambda *bounds: range(*bounds)[-2:] if len(bounds) == 1 else range(*bounds)  # noqa: E731
    with mock.patch.object(interpreter, "range", last_two, create=True), faithful():
        registry.OPS["pack_bf16_"].launch(far_n, packed_m)
        registry.OPS["unpack_bf16_"].launch(packed_m, back_n)
    assert torch.equal(back_n[-codec.SEGMENT :], near_n)


def test_values_may_lie_beyond_2_to_the_31(interpreted):
    """Interpreted."""
    interpreted.run(_beyond_int32)


def _opcheck() -> None:
    bits_n = bits_of(torch.randn(5000))
    packed_m = pack(codec.pack_reference, bits_n)
    torch.library.opcheck(registry.OPS["pack_bf16_"].op, (bits_n, packed_m))
    torch.library.opcheck(registry.OPS["unpack_bf16_"].op, (packed_m, bits_n))


def test_the_ops_tell_torch_the_truth_about_their_schemas_and_fakes(interpreted):
    """Run here, and interpreted."""
    _opcheck()
    interpreted.run(_opcheck)


def _proof(name: str, broken: bool) -> str:
    kernel = registry.OPS[name]
    with faithful():
        if not broken:
            return registry._find_mismatch(kernel, torch.device("cpu"))

        def wrong(*args):
            kernel.op(*args)
            args[-1][-1] += 1

        broken_kernel = mock.Mock(wraps=kernel, reference=kernel.reference, op=wrong)
        return registry._find_mismatch(broken_kernel, torch.device("cpu"))


@pytest.mark.parametrize("name", ["pack_bf16_", "unpack_bf16_"])
def test_the_test_before_first_use_passes_the_kernel_and_sees_one_wrong_element(interpreted, name):
    """Interpreted."""
    assert interpreted.run(_proof, name, False) == ""
    assert "has error 1.0e+00" in interpreted.run(_proof, name, True)


def test_the_definition_never_waits_for_the_device():
    bits_n = torch.empty(5000, dtype=torch.int16, device="meta")  # has no values that it could wait for
    packed_m = torch.empty(codec.packed_bytes(5000), dtype=torch.uint8, device="meta")
    codec.pack_reference(bits_n, packed_m)
    codec.unpack_reference(packed_m, bits_n)


def test_tensors_without_data_can_be_packed():
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            x_n = torch.empty(5000, dtype=torch.bfloat16, device=device)
            packed_m = torch.empty(codec.packed_bytes(5000), dtype=torch.uint8, device=device)
            codec.pack_(x_n, packed_m)
            codec.unpack_(packed_m, x_n)


def test_values_that_need_a_gradient_are_packed_without_one():
    x_n = torch.randn(100).bfloat16().requires_grad_()
    packed_m = torch.empty(codec.packed_bytes(100), dtype=torch.uint8)
    codec.pack_(x_n, packed_m)
    codec.unpack_(packed_m, back_n := torch.zeros(100, dtype=torch.bfloat16))
    assert torch.equal(back_n, x_n.detach()) and not packed_m.requires_grad


def test_what_does_not_fit_together_is_refused():
    x_n, m = torch.zeros(100, dtype=torch.bfloat16), codec.packed_bytes(100)
    packed_m = torch.zeros(m + 32, dtype=torch.uint8)
    wrong = [
        (x_n.float(), packed_m[:m]),
        (x_n, packed_m[: m - 1]),
        (x_n, packed_m[8 : m + 8]),
        (x_n.view(10, 10), packed_m[:m]),
        (x_n.repeat(2)[::2], packed_m[:m]),
        (x_n, packed_m[:m].view(torch.int8)),
        (x_n, packed_m[:m].to("meta")),
    ]
    for x, packed in wrong:
        for call in (lambda x=x, p=packed: codec.pack_(x, p), lambda x=x, p=packed: codec.unpack_(p, x)):
            with pytest.raises(AssertionError):
                call()
    codec.pack_(x_n, packed_m[16 : m + 16])

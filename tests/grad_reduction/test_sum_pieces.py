"""The local sum of a gradient reduction: the compiled op and its definition in torch, bit by bit and against fp64.

P pieces, n elements of the slice. The compiled op is that of csrc/ on CPU.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.reduction.op import memory
from deepspeed_alst.errors import ShapeError
from deepspeed_alst.grad_reduction.sum_pieces import sum_pieces, sum_pieces_reference
from deepspeed_alst.kernels.builder import load

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
EVERY_HALF = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    assert load("cpu") == "csrc op"
    assert torch._C._dispatch_has_kernel_for_dispatch_key("deepspeed_alst::sum_pieces", "CPU")


def assert_same_bits(got, want):
    """Equal in every bit, signs of zeros included; a NaN is a NaN."""
    assert got.dtype == want.dtype
    differ = (got.view(BITS[got.dtype]) != want.view(BITS[want.dtype])) & ~(got.isnan() & want.isnan())
    assert not differ.any(), f"{int(differ.sum())} differ, the first: {got[differ][0]} for {want[differ][0]}"


def both(pieces_Pn, out_n, scale=1.0, accumulate=False):
    """What the compiled op and the definition make of the same tensors."""
    got_n, want_n = out_n.clone(), out_n.clone()
    sum_pieces(pieces_Pn, got_n, scale, accumulate)
    sum_pieces_reference(pieces_Pn, want_n, scale, accumulate)
    return got_n, want_n


def random_pieces(P, n, dtype, spread=4.0):
    """Numbers over several magnitudes, so that the order of addition matters."""
    return (torch.randn(P, n) * torch.exp(spread * torch.randn(P, n))).to(dtype)


@pytest.mark.parametrize(("dtype", "out_dtype"), itertools.product(DTYPES, DTYPES))
def test_the_compiled_op_is_its_definition_bit_by_bit(dtype, out_dtype):
    torch.manual_seed(0)
    for P, n in itertools.product((1, 2, 3, 4, 7, 8, 13), (0, 1, 7, 63, 1000, 4097)):
        for scale, accumulate in ((1.0, False), (1 / 3, False), (-0.125, True), (1 / 3, True)):
            out_n = torch.full((n,), torch.nan, dtype=out_dtype) if not accumulate else torch.randn(n).to(out_dtype)
            assert_same_bits(*both(random_pieces(P, n, dtype), out_n, scale, accumulate))


def test_pieces_are_added_in_their_order():
    for dtype in DTYPES:
        big = torch.finfo(dtype).max / 4 if dtype is torch.float32 else 2.0**15
        for P in range(2, 10):
            pieces_Pn = torch.full((P, 9), 2.0**-12).to(dtype)
            pieces_Pn[0], pieces_Pn[-1] = big, -big  # what is added in between is lost in the right order only
            got_n, want_n = both(pieces_Pn, torch.empty(9))
            in_order_n = torch.stack(list(itertools.accumulate(pieces_Pn.float())))[-1]
            assert_same_bits(got_n, in_order_n)
            assert_same_bits(want_n, in_order_n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_every_half_precision_number_goes_through(dtype, out_dtype):
    every_n = EVERY_HALF.view(dtype)  # subnormals, zeros of both signs, infinities, NaNs
    for scale in (1.0, 0.5, 3e-5, 1e4):
        assert_same_bits(*both(every_n[None], torch.empty(every_n.shape, dtype=out_dtype), scale))
    assert_same_bits(*both(torch.stack([every_n, every_n.flip(0)]), every_n.clone().to(out_dtype), 0.7, True))


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_is_to_nearest_even_next_to_every_half_precision_number(out_dtype):
    every_n = EVERY_HALF.view(out_dtype)
    every_n = every_n[every_n.isfinite()].float()
    up_n = EVERY_HALF.view(out_dtype)[EVERY_HALF.view(out_dtype).isfinite()]
    up_n = (up_n.view(torch.int16) + 1).view(out_dtype).float()
    halfway_n = ((every_n.double() + up_n.double()) / 2).float()  # a tie, exactly
    for near_n in (
        halfway_n,
        torch.nextafter(halfway_n, torch.tensor(torch.inf)),
        torch.nextafter(halfway_n, torch.tensor(-torch.inf)),
    ):
        got_n, want_n = both(near_n[None], torch.empty(near_n.shape, dtype=out_dtype))
        assert_same_bits(got_n, want_n)
        assert_same_bits(got_n, near_n.to(out_dtype))


def test_infinities_and_nans_go_through():
    inf, nan = torch.inf, torch.nan
    pieces_Pn = torch.tensor([[inf, inf, nan, 3e38, -0.0], [1.0, -inf, 1.0, 3e38, -0.0]])
    for dtype, out_dtype in itertools.product(DTYPES, DTYPES):
        got_n, want_n = both(pieces_Pn.to(dtype), torch.empty(5, dtype=out_dtype))
        assert_same_bits(got_n, want_n)
        assert got_n[0] == inf and got_n[1:3].isnan().all() and got_n[3] == inf
        assert got_n[4] == 0 and got_n[4].signbit()  # a sum that began at +0 would lose the sign


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_rows_and_out_may_begin_anywhere(out_dtype):
    torch.manual_seed(0)
    n = 1000
    for dtype, distance, begin in itertools.product(DTYPES, (n, n + 1, n + 24), (0, 1, 5)):
        storage = random_pieces(1, 3 * distance + begin, dtype)[0]
        pieces_Pn = storage[begin : begin + 3 * distance].view(3, distance)[:, :n]
        frame = torch.full((n + 2 + begin,), 7.0, dtype=out_dtype)
        sum_pieces(pieces_Pn, frame[begin + 1 : begin + 1 + n], 0.5)
        want_n = torch.empty(n, dtype=out_dtype)
        sum_pieces_reference(pieces_Pn, want_n, 0.5)
        assert_same_bits(frame[begin + 1 : begin + 1 + n], want_n)
        assert (frame[: begin + 1] == 7).all() and frame[-1] == 7, "written beyond out"


def test_the_definition_is_the_same_in_parts():
    n = (1 << 20) + 4097  # a whole part and a piece of the next
    pieces_Pn = random_pieces(3, n, torch.bfloat16)
    want_n = (((pieces_Pn[0].float() + pieces_Pn[1]) + pieces_Pn[2]) * 0.3).bfloat16()
    got_n, reference_n = both(pieces_Pn, torch.empty(n, dtype=torch.bfloat16), 0.3)
    assert_same_bits(reference_n, want_n)
    assert_same_bits(got_n, want_n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_the_error_against_fp64_is_that_of_fp32_additions_and_one_rounding(dtype, out_dtype):
    torch.manual_seed(0)
    P, n, scale = 8, 4097, 1 / 8
    pieces_Pn = torch.randn(P, n).to(dtype)
    got_n, truth_n = torch.empty(n, dtype=out_dtype), torch.empty(n, dtype=torch.float64)
    sum_pieces(pieces_Pn, got_n, scale)
    sum_pieces(pieces_Pn.double(), truth_n, scale)
    assert torch.equal(truth_n, torch.stack(list(itertools.accumulate(pieces_Pn.double())))[-1] * scale)
    additions_n = P * torch.finfo(torch.float32).eps / 2 * pieces_Pn.double().abs().sum(0) * scale
    rounding_n = torch.finfo(out_dtype).eps / 2 * (truth_n.abs() + additions_n) + torch.finfo(out_dtype).tiny * 2**-7
    assert ((got_n.double() - truth_n).abs() <= additions_n + rounding_n).all()
    plain_n = pieces_Pn.sum(0).mul(scale).to(out_dtype)  # torch in the pieces' dtype
    ours, theirs = ((each_n.double() - truth_n).square().mean().sqrt() for each_n in (got_n, plain_n))
    assert ours <= 1.05 * theirs


def test_threads_change_nothing():
    pieces_Pn = random_pieces(5, 300_001, torch.bfloat16)
    alone_n, together_n = torch.empty(300_001), torch.empty(300_001)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        sum_pieces(pieces_Pn, alone_n, 0.2)
        torch.set_num_threads(3)
        sum_pieces(pieces_Pn, together_n, 0.2)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(together_n, alone_n)


def test_nothing_is_needed_beyond_the_output():
    assert memory("op") < 1 << 19 < 100 << 20 < memory("plain")  # what torch needs shows that it is measured


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
def test_torch_finds_the_op_well_made(dtype, accumulate):
    arguments = (torch.randn(3, 63).to(dtype), torch.zeros(63), 0.5, accumulate)
    checks = torch.library.opcheck(torch.ops.deepspeed_alst.sum_pieces.default, arguments)
    assert set(checks.values()) == {"SUCCESS"} and len(checks) == 4


def test_fake_tensors_and_meta_tensors_pass_and_are_checked():
    with FakeTensorMode():
        sum_pieces(torch.empty(8, 1 << 40, dtype=torch.bfloat16), torch.empty(1 << 40), 0.5, True)
        with pytest.raises(ShapeError):
            torch.ops.deepspeed_alst.sum_pieces(torch.empty(8, 63), torch.empty(62), 0.5, True)
    sum_pieces(torch.empty(8, 63, device="meta"), torch.empty(63, device="meta"), 0.5)


@pytest.mark.parametrize(
    ("pieces", "out", "says"),
    [
        (torch.ones(63), torch.ones(63), "[P, n]"),
        (torch.ones(0, 63), torch.ones(63), "[P, n]"),
        (torch.ones(63, 2).t(), torch.ones(63), "contiguous"),
        (torch.ones(2, 63), torch.ones(62), "out must be"),
        (torch.ones(2, 63), torch.ones(126)[::2], "out must be"),
        (torch.ones(2, 63, dtype=torch.int32), torch.ones(63), "int32"),
        (torch.ones(2, 63), torch.ones(63, dtype=torch.float64), "float64"),
        (torch.ones(2, 63), torch.ones(63, device="meta"), "one device"),
    ],
)
@pytest.mark.parametrize("function", [sum_pieces, sum_pieces_reference])
def test_what_does_not_fit_is_an_error_that_says_how(function, pieces, out, says):
    with pytest.raises(ShapeError, match="sum_pieces: ") as error:
        function(pieces, out, 1.0)
    assert says in str(error.value) and str(list(out.shape)) in str(error.value)

"""Packing and unpacking around the all-to-all: every cell says where it came from, and nothing is copied twice.

*Interpreted*: the Triton kernel, in a process of its own. *Run here*: the definition in torch, alone and between gloo
ranks. Nothing here ran on a GPU.
"""

import itertools
import sys
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels.heads import Case, compare, judge
from benchmarks.kernels.interpreter import faithful
from benchmarks.kernels.judge import Interpreted
from deepspeed_alst.attention.head_plan import HeadPlan
from deepspeed_alst.attention.ulysses import ulysses_attention
from deepspeed_alst.kernels import head_layout, registry
from deepspeed_alst.kernels.head_layout import by_heads, by_tokens, pack, pack_reference, unpack_
from deepspeed_alst.profiler.fake import fake_ranks, fake_world

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# P, H, K, D of q and k, of v: kv heads split, one each, shared by ranks, single; sizes of real models and odd ones.
SIZES = ((1, 2, 1, 5, 5), (2, 6, 2, 80, 80), (3, 6, 3, 17, 9), (4, 8, 2, 96, 96), (8, 8, 8, 24, 16), (8, 8, 1, 7, 7))


@pytest.fixture(scope="module")
def interpreted():
    process = Interpreted()
    yield process
    process.close()


# --- every cell


def _cells(sizes: tuple[int, ...], B: int, s: int, within=nullcontext) -> None:
    """All ranks of an exchange in one process: q, k and v there, their gradients back. fp32 counts exactly."""
    P, H, K, D, V = sizes
    plan, S = HeadPlan(P, H, K), P * s
    shapes = ((B, H, S, D), (B, K, S, D), (B, K, S, V))
    # A number of its own for each tensor, sample, head, token and place.
    ends = list(itertools.accumulate((torch.Size(each).numel() for each in shapes), initial=1))
    whole = [torch.arange(ends[i], ends[i + 1], dtype=torch.float32).view(shape) for i, shape in enumerate(shapes)]
    groups = (P, min(P, K), min(P, K))
    with within():
        shards = [[x[:, :, r * s : (r + 1) * s] for x in whole] for r in range(P)]
        sent = [pack([by_heads(x, g) for x, g in zip(each, groups, strict=True)], P) for each in shards]
        back = []
        for r in range(P):
            recv_PsBW = torch.stack([each[r] for each in sent])
            held = (plan.heads_of(r), plan.kv_heads_of(r), plan.kv_heads_of(r))
            expected = [x[:, list(of)] for x, of in zip(whole, held, strict=True)]
            got = [torch.full_like(x, torch.nan) for x in expected]
            unpack_(recv_PsBW, [by_tokens(x, P) for x in got])
            assert all(map(torch.equal, got, expected)), f"rank {r} has another's"
            back.append(pack([by_tokens(x, P) for x in expected], P))
        for r in range(P):
            back_PsBW = torch.stack([each[r] for each in back])
            got = [torch.full((B, s, *x.shape[1::2]), torch.nan).transpose(1, 2) for x in whole]
            unpack_(back_PsBW, [by_heads(x, g) for x, g in zip(got, groups, strict=True)])
            # Each rank that holds a kv head sends its number back.
            for x, y, copies in zip(got, shards[r], (P // g for g in groups), strict=True):
                assert torch.equal(x, copies * y), f"rank {r} got another's back"


@pytest.mark.parametrize(("B", "s"), [(1, 1), (2, 13)])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_cell_goes_where_its_head_and_token_belong_and_comes_back(sizes, B, s):
    """Run here, by torch."""
    _cells(sizes, B, s)


def test_the_kernel_sends_every_cell_there_too(interpreted):
    """Interpreted."""
    interpreted.run(_cells, (4, 8, 2, 24, 17), 1, 5, faithful)


# --- against the definition

ODD = (
    Case(2, 6, 2, 80, 80, 33, B=2),
    Case(4, 4, 1, 192, 128, 3, heads_first=True),
    Case(3, 3, 3, 75, 33, 67),
    Case(8, 8, 2, 16, 16, 5, B=3),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_on_cpu_moves_are_the_definitions_bits_and_sums_as_good_as_torchs(case, dtype):
    """Run here."""
    found = compare(Case(**{**vars(case), "dtype": dtype}))
    assert all(error <= most for error, most in found.values()), found


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[pytest.mark.slow] * (case is ODD[3] and dtype != torch.bfloat16))
        for case in ODD[1:]
        for dtype in DTYPES
    ],
    ids=str,
)
def test_the_kernel_moves_each_byte_once_and_is_as_good_as_torch(interpreted, case, dtype):
    """Interpreted. Bytes of all loads and stores, beside the least."""
    verdict = interpreted.run(judge, Case(**{**vars(case), "dtype": dtype}))
    assert verdict.is_accurate and verdict.is_lean, verdict
    copies = max(1, case.P // case.K)
    assert (verdict.moved == 2 * dtype.itemsize) == (copies == 1), "a piece that many ranks get is read once"


def _edges(within=nullcontext) -> None:
    with within():
        # Nothing to move: no tokens, no samples.
        for shape in ((2, 4, 0, 8), (0, 4, 3, 8)):
            x = torch.randn(shape)
            packed = pack([by_heads(x, 2), by_heads(x, 2)], 2)
            assert packed.shape == (2, shape[2], shape[0], 32)
            unpack_(packed, [by_heads(x, 2), by_heads(x, 2)])
        # Slices of one projection, a broadcast gradient, and elements that do not lie side by side.
        qkv = torch.randn(2, 5, 12, 6)
        q, k, v = (each.transpose(1, 2) for each in qkv.split((6, 3, 3), dim=2))
        for tensors in ((q, k, v), (torch.ones(()).expand(2, 6, 5, 6), k, k), (q.transpose(2, 3), v, v)):
            pieces = [by_heads(x if x.shape[2] == 5 else x.transpose(2, 3), 3) for x in tensors]
            assert torch.equal(pack(pieces, 6), pack_reference(pieces, 6))
        # Under autocast q and k may be wider than v: the buffer has q's dtype.
        mixed = [by_heads(q, 3), by_heads(k, 3), by_heads(v.bfloat16(), 3)]
        assert torch.equal(pack(mixed, 3), pack_reference(mixed, 3)) and pack(mixed, 3).dtype == torch.float32
        # fp64 is exact.
        exact = [by_heads(x.double(), 3) for x in (q, k, v)]
        unpack_(pack(exact, 6), out := [torch.empty_like(x) for x in exact])
        assert all(torch.equal(x, 2 * y) for x, y in zip(out, exact, strict=True))
        # A tensor in the layout of the buffer is sent as it is.
        there = torch.randn(3, 5, 2, 4, 6)
        assert pack([there], 3).data_ptr() == there.data_ptr() and pack([there], 3).shape == (3, 5, 2, 24)


def test_empty_odd_and_mixed_tensors(interpreted):
    """Run here, and interpreted."""
    _edges()
    interpreted.run(_edges, faithful)


def _beyond_int32(within=nullcontext) -> None:
    # Memory that nothing touches is not taken: three pieces, the last of them 2**31 + 16 elements in.
    far = torch.empty(2**31 + 100, dtype=torch.bfloat16).as_strided((3, 2, 1, 2, 8), (2**30 + 8, 16, 0, 8, 1))
    near = torch.randn(3, 2, 1, 2, 8).bfloat16()
    with within():
        far.copy_(near)
        packed = pack([far, far], 3)
        assert torch.equal(packed, pack_reference([near, near], 3))
        far.zero_()
        unpack_(packed, [far, near])
    assert torch.equal(far, near)


def test_pieces_may_begin_beyond_2_to_the_31_elements(interpreted):
    """Run here, and interpreted."""
    _beyond_int32()
    interpreted.run(_beyond_int32, faithful)


def _opcheck() -> None:
    pieces = [by_heads(torch.randn(1, 3, 4, 8).transpose(1, 2), g) for g in (4, 2)]
    torch.library.opcheck(registry.OPS["pack_heads"].op, (pieces, 4))
    torch.library.opcheck(registry.OPS["unpack_heads_"].op, (torch.randn(4, 3, 1, 24), pieces))


def test_the_ops_tell_torch_the_truth_about_their_schemas_and_fakes(interpreted):
    """Run here, and interpreted."""
    _opcheck()
    interpreted.run(_opcheck)


# --- in attention


class _Copies(TorchDispatchMode):
    """Operators that move as many elements as this, in order, but for attention's own."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.found: list[str] = []
        self._elements = elements

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        written = [x for x in torch.utils._pytree.tree_leaves((result, args)) if isinstance(x, torch.Tensor)]
        moves = name in ("copy_", "clone", "cat", "_to_copy", "sum", "add", "pack_heads", "unpack_heads_")
        if moves and max((x.numel() for x in written), default=0) >= self._elements:
            self.found.append(name)
        return result


def _attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _copies(B: int, K: int) -> tuple[list[str], list[str]]:
    P, H, s, D = 4, 8, 6, 16
    with fake_ranks(P), faithful():
        projected = [torch.randn(B, s, heads * D, requires_grad=True) for heads in (H, K, K)]
        with _Copies(B * s * K * D) as forward:
            q, k, v = (x.view(B, s, -1, D).transpose(1, 2) for x in projected)
            out_BsHD = ulysses_attention(q, k, v, None, _attend)
        with _Copies(B * s * K * D) as backward:
            torch.autograd.grad(out_BsHD, projected, torch.randn_like(out_BsHD))
    return forward.found, backward.found


@pytest.mark.parametrize(("B", "K"), [(1, 4), (1, 2), (2, 1)])
def test_each_tensor_is_copied_once_on_each_side_of_an_exchange(interpreted, B, K):
    """Interpreted, from projections to their gradients. By torch it takes 4 operators, and 6 to 10, for 1.2 to 1.5
    times the bytes of this backward."""
    forward, backward = interpreted.run(_copies, B, K)
    # Attention's output lies as it is sent; what is received of q, k and v and of the output's gradient is a view.
    assert forward == ["pack_heads", "unpack_heads_"]
    assert backward == ["pack_heads", "pack_heads", "unpack_heads_"]


def _one_falls_back(K: int, dtype: torch.dtype) -> None:
    """With a rank, with all and with none that computes by torch, results are the same bits."""
    P, rank, B, H, s, D = dist.get_world_size(), dist.get_rank(), 2, 8, 5, 24
    make, results = torch.Generator().manual_seed(rank), []
    tensors = [
        torch.randn(B, s, heads, D, generator=make).to(dtype).transpose(1, 2).requires_grad_() for heads in (H, K, K)
    ]
    weight = torch.randn(B, s, H, D, generator=make).to(dtype)
    for by_torch in ((), (1,), range(P)):
        with mock.patch.object(head_layout, "_kernel_picker", lambda: None) if rank in by_torch else nullcontext():
            out = ulysses_attention(*tensors, None, _attend)
            results.append([out, *torch.autograd.grad(out, tensors, weight)])
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))
    assert all(x.isfinite().all() and x.abs().max() > 0 for x in results[0])


@pytest.mark.parametrize(("K", "dtype"), [(4, torch.bfloat16), (2, torch.float32), (2, torch.bfloat16)])
def test_ranks_may_differ_in_what_packs(ranks4, K, dtype):
    """Run here. At most two copies of a kv head: a sum of two is the same in any order."""
    ranks4.run(_one_falls_back, K, dtype)


def test_tensors_without_data_take_the_op(recwarn):
    with fake_world(2):
        q, k = (torch.empty(1, heads, 6, 16, requires_grad=True) for heads in (4, 2))
        out = ulysses_attention(q, k, k, None, _attend)
        out.sum().backward()
        assert out.shape == (1, 6, 4, 16) and k.grad.shape == k.shape
    assert not [each for each in recwarn if "deepspeed_alst" in str(each.message)]


def test_without_triton_torch_packs(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed_alst.kernels.pack_heads", None)
    monkeypatch.delattr("deepspeed_alst.kernels.pack_heads", raising=False)
    head_layout._kernel_picker.cache_clear()
    try:
        pieces = [by_heads(torch.randn(1, 4, 3, 8), 2)] * 2
        assert head_layout._kernel_picker() is None and torch.equal(pack(pieces, 2), pack_reference(pieces, 2))
    finally:
        head_layout._kernel_picker.cache_clear()

"""Attention by rectangles: every pair of a query and a key that it sees, once, and the numbers of fp64."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepspeed_alst.attention import attention_kernels
from deepspeed_alst.attention.attention_kernels import Dropout, FlashKernel, TorchKernel, kernel_for
from deepspeed_alst.attention.hf_masks import MaskSpec
from deepspeed_alst.attention.rectangle_attention import add_gradients, attend
from deepspeed_alst.attention.rectangles import Rectangle, blocks, in_block, rectangles
from deepspeed_alst.random_draws.counter_based import attention_keeps


@st.composite
def cuts(draw):
    length = draw(st.integers(1, 60))
    inner = draw(st.lists(st.integers(1, length), max_size=4))
    bounds = tuple(sorted({0, length, *inner})) if inner else ()
    mask = MaskSpec(draw(st.none() | st.integers(1, 70)), draw(st.none() | st.integers(1, 20)), bounds)
    first = draw(st.integers(0, length - 1))
    return length, mask, first, draw(st.integers(first + 1, length)), draw(st.integers(1, 70))


def pairs_of(parts, length):
    """Count how often rectangles hold each pair of a row and a key."""
    seen = torch.zeros(length, length, dtype=torch.int)
    for part in parts:
        pairs = torch.ones_like(seen[part.first_row : part.last_row, part.first_key : part.last_key])
        assert pairs.numel()
        seen[part.first_row : part.last_row, part.first_key : part.last_key] += {
            "lower": torch.tril,
            "upper": torch.triu,
            "": torch.clone,
        }[part.triangle](pairs)
    return seen


@settings(max_examples=400)
@given(cuts())
def test_rectangles_hold_each_visible_pair_once(cut):
    length, mask, first, last, key_block = cut
    seen = torch.zeros(length, length, dtype=torch.int)
    for part in rectangles(first, last, length, mask, key_block):
        pairs = torch.ones(part.last_row - part.first_row, part.last_key - part.first_key, dtype=torch.int)
        assert pairs.numel()
        if part.triangle:
            assert pairs.shape[0] == pairs.shape[1]  # on other shapes kernels disagree about causal
            pairs = pairs.tril() if part.triangle == "lower" else pairs.triu()
        else:
            assert pairs.shape[1] <= max(key_block, mask.window or 0)
        seen[part.first_row : part.last_row, part.first_key : part.last_key] += pairs
    expected = mask.seen(length).int()
    expected[:first] = expected[last:] = 0
    assert torch.equal(seen, expected)


@settings(max_examples=200)
@given(cuts(), st.integers(1, 9), st.integers(1, 9))
def test_blocks_hold_each_pair_of_their_rectangle_once(cut, rows, keys):
    length, mask, first, last, key_block = cut
    for whole in rectangles(first, last, length, mask, key_block):
        parts = list(blocks(whole, rows, keys))
        assert torch.equal(pairs_of([whole], length), pairs_of(parts, length))
        for part in parts:
            num_rows, num_keys = part.last_row - part.first_row, part.last_key - part.first_key
            assert num_rows <= rows and num_keys <= max(rows, keys)


@settings(max_examples=200)
@given(cuts(), st.integers(1, 20))
def test_blocks_of_keys_hold_each_pair_of_a_rectangle_once(cut, size):
    length, mask, first, last, _ = cut
    for whole in rectangles(first, last, length, mask, length):
        parts = [part for begin in range(0, length, size) for part in in_block([whole], begin, begin + size)]
        assert torch.equal(pairs_of([whole], length), pairs_of(parts, length))
        for part in parts:
            assert part.first_key // size == (part.last_key - 1) // size
            assert not part.triangle or part.last_row - part.first_row == part.last_key - part.first_key


# Errors of torch's own attention in these dtypes are of the same size.
LIMITS = {torch.float64: 2e-15, torch.float32: 1e-6, torch.bfloat16: 8e-3}
MASKS = [None, MaskSpec(7), MaskSpec(5, None, (0, 20, 48)), MaskSpec(None, 9), MaskSpec(None, None, (0, 1, 47, 48))]


DROPPED = Dropout(0.3, 11, range(5, 11), first_sample=3)


@pytest.mark.parametrize(
    "kernel",
    [FlashKernel(None), TorchKernel(None, None), TorchKernel(0.3, 2.0), TorchKernel(None, 2.0, DROPPED)],
    ids=["flash", "plain", "softcap", "dropout"],
)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("sizes", [(2, 6, 2, 16, 8), (1, 3, 3, 8, 24)], ids=str)
def test_output_and_gradients_are_those_of_fp64(dtype, mask, sizes, kernel, monkeypatch):
    monkeypatch.setattr(attention_kernels, "_ROWS", 6)  # blocks of 6 rows and 11 or 22 keys
    monkeypatch.setattr(attention_kernels, "_SCORES", 400)
    B, h, k, D, E = sizes
    S = 48
    make = torch.Generator().manual_seed(0)
    q, keys, values, do = (
        torch.randn(B, heads, S, size, generator=make).to(dtype) for heads, size in ((h, D), (k, D), (k, E), (h, E))
    )
    q64, k64, v64 = (x.double().requires_grad_() for x in (q, keys, values))
    scores = q64 @ k64.repeat_interleave(h // k, 1).transpose(2, 3) * (kernel.scale or D**-0.5)
    if (softcap := getattr(kernel, "softcap", None)) is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~(mask or MaskSpec()).seen(S), -torch.inf)
    weights = scores.softmax(-1)
    if (dropout := getattr(kernel, "dropout", None)) is not None:
        kernel = kernel._replace(dropout=dropout._replace(heads=range(5, 5 + h)))
        kept = attention_keeps(11, range(3, 3 + B), range(5, 5 + h), range(S), range(S), 0.7, "cpu")
        assert 0.65 < kept.double().mean() < 0.75
        weights = weights * kept / 0.7
    expected = weights @ v64.repeat_interleave(h // k, 1)
    expected.backward(do.double())

    wide = torch.promote_types(dtype, torch.float32)
    dk, dv = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
    outputs, dq = [], []
    with torch.no_grad():
        for first, last in ((0, 20), (20, 33), (33, 48)):
            rows = [x[:, :, first:last] for x in (do, q)]
            parts = list(rectangles(first, last, S, mask, 13))
            o, lse = attend(rows[1], keys, values, parts, first, kernel)
            outputs.append(o)
            dq.append(torch.zeros_like(rows[1], dtype=wide))
            add_gradients(dq[-1], dk, dv, (*rows, o, lse), (keys, values), parts, (first, 0), kernel)
    found = torch.cat(outputs, 2), torch.cat(dq, 2), dk, dv
    for name, mine, true in zip("oqkv", found, (expected, q64.grad, k64.grad, v64.grad), strict=True):
        assert (mine.double() - true).norm() <= LIMITS[dtype] * true.norm(), name


def test_dropout_of_all_weights_leaves_zeros():
    kernel = TorchKernel(None, None, DROPPED._replace(p=1.0, heads=range(2)))
    q, keys, values = (torch.randn(1, 2, 5, 4) for _ in range(3))
    o, lse = attend(q, keys, values, rectangles(0, 5, 5, None, 3), 0, kernel)
    assert not o.any() and lse.isfinite().all()


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "softcap", "kernel"),
    [
        ("cpu", torch.float32, 512, None, FlashKernel),
        ("cuda", torch.bfloat16, 256, None, FlashKernel),
        ("cuda", torch.bfloat16, 512, None, TorchKernel),
        ("cuda", torch.float32, 64, None, TorchKernel),
        ("cpu", torch.float32, 64, 50.0, TorchKernel),
    ],
)
def test_plain_torch_attends_where_flash_attention_cannot(device, dtype, head_dim, softcap, kernel):
    with FakeTensorMode():
        q = torch.empty(1, 2, 3, head_dim, dtype=dtype, device=device)
    assert type(kernel_for(q, None, softcap)) is kernel


def test_the_cuda_ops_take_these_arguments_by_their_meta_kernels():
    """Signatures and shapes alone: torch's meta kernels in the place of CUDA's."""
    aten = torch.ops.aten
    q, k = (
        torch.empty(1, heads, tokens, 64, dtype=torch.bfloat16, device="meta") for heads, tokens in ((4, 9), (2, 7))
    )
    o, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, k, 0.0, False, scale=0.1)
    assert o.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    none = q.new_empty(0, dtype=torch.int64)
    found = aten._scaled_dot_product_flash_attention_backward(
        o, q, k, k, o, lse, None, None, 9, 7, 0.0, False, none, none, scale=0.1
    )
    assert [x.shape for x in found] == [q.shape, k.shape, k.shape]


def test_the_cuda_kernel_gets_a_contiguous_log_sum_exp(monkeypatch):
    """torch's flash attention reads it by its address: against the real operator's signature, on fake tensors."""
    # The method, unlike the function, needs the device itself.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: torch.clone(x, memory_format=torch.contiguous_format))
    found = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
                found.append(args[5])
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Record():
        q, o, do = (torch.empty(1, 4, 64, 16, device="cuda", dtype=torch.bfloat16).narrow(2, 0, 32) for _ in range(3))
        k, v = (torch.empty(1, 2, 64, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        lse = torch.empty(1, 4, 64, device="cuda").narrow(2, 0, 32)
        with contextlib.suppress(RuntimeError):  # of indexing fake tensors on a machine without CUDA
            FlashKernel(None).backward(do, q, k, v, o, lse, Rectangle(0, 32, 0, 64))
    assert [x.shape for x in found] == [lse.shape] and found[0].is_contiguous() and not lse.is_contiguous()

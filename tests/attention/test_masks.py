"""Windows, chunks and packed documents of the whole sequence under sdpa, in fp64: run here.

The truth of the pieces is sdpa under a mask of all S x S pairs; that of a model is SP 1 with transformers' own masks.
"""

import copy
import functools
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    remap_positions_for_packed_sequence,
    sliding_window_causal_mask_function,
)

from deepspeed_alst.attention import blocked_sdpa as banded
from deepspeed_alst.attention import hf_masks as masks
from deepspeed_alst.attention.blocked_sdpa import attend
from deepspeed_alst.attention.hf_attention import find_backend
from deepspeed_alst.attention.hf_masks import MaskSpec, mask_function_for, read_mask
from deepspeed_alst.core.forward_context import ForwardContext
from deepspeed_alst.errors import UnsupportedModelError
from tests.attention.test_cores import EXACT

NO_PADDING = torch.zeros(1, dtype=torch.long)


# --- the pieces


@pytest.mark.parametrize(
    ("mask", "length", "runs"),
    [
        (MaskSpec(), 12, [(1, 12)]),
        (MaskSpec(window=5), 12, [(1, 12)]),
        (MaskSpec(chunk=5), 12, [(2, 5), (1, 2)]),
        (MaskSpec(chunk=4), 12, [(3, 4)]),
        (MaskSpec(documents=(0, 7, 8, 16)), 16, [(1, 7), (1, 1), (1, 8)]),
        # Neighbours of the same length are attended to together; a chunk starts where its document does.
        (MaskSpec(documents=(0, 1, 2, 3, 7)), 7, [(3, 1), (1, 4)]),
        (MaskSpec(chunk=4, documents=(0, 7, 11, 16)), 16, [(1, 4), (1, 3), (2, 4), (1, 1)]),
        (MaskSpec(documents=(0, 3, 3, 5)), 5, [(1, 3), (1, 2)]),
    ],
)
def test_a_sequence_falls_into_runs_of_stretches_of_the_same_length(mask, length, runs):
    assert mask.runs(length) == runs


def inputs(B: int, h: int, k: int, S: int, D: int = 8, Dv: int = 8, seed: int = 0) -> list[torch.Tensor]:
    """q, k and v as the all-to-all leaves them: views of tokens."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(S, B, h, D), (S, B, k, D), (S, B, k, Dv)]
    return [torch.randn(shape, generator=make, dtype=torch.float64).permute(1, 2, 0, 3) for shape in shapes]


def all_pairs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: MaskSpec, scaling: float) -> torch.Tensor:
    index = torch.arange(q.shape[2])
    sees = mask.rule(q.shape[2])(0, 0, index[:, None], index)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scaling)


DOCUMENTS_300 = (0, 1, 2, 40, 180, 219, 300)


@pytest.mark.parametrize(
    ("mask", "B", "h", "k", "S", "Dv"),
    [
        (MaskSpec(window=1), 2, 4, 2, 300, 8),
        (MaskSpec(window=5), 1, 4, 1, 300, 8),
        (MaskSpec(window=5), 2, 4, 2, 201, 12),
        (MaskSpec(window=70), 1, 4, 4, 301, 8),
        (MaskSpec(window=70), 2, 2, 1, 140, 8),
        (MaskSpec(window=299), 1, 4, 2, 300, 8),
        (MaskSpec(window=300), 1, 4, 2, 300, 8),
        (MaskSpec(chunk=16), 2, 4, 2, 300, 8),
        (MaskSpec(documents=DOCUMENTS_300), 1, 4, 2, 300, 12),
        (MaskSpec(window=7, documents=DOCUMENTS_300), 1, 4, 2, 300, 8),
        (MaskSpec(chunk=16, documents=DOCUMENTS_300), 1, 4, 2, 300, 8),
        (MaskSpec(chunk=80, window=7, documents=DOCUMENTS_300), 1, 4, 2, 300, 8),
    ],
)
@pytest.mark.parametrize("span", [banded._SPAN, 128])
def test_attention_by_pieces_is_attention_under_a_mask(mask, B, h, k, S, Dv, span):
    qkv = [x.requires_grad_() for x in inputs(B, h, k, S, Dv=Dv)]
    with mock.patch.object(banded, "_SPAN", span):
        got, true = attend(*qkv, mask, 0.3), all_pairs(*qkv, mask, 0.3)
    weight = torch.randn(true.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads, truths = (torch.autograd.grad(out, qkv, weight) for out in (got, true))
    for ours, theirs in zip((got, *grads), (true, *truths), strict=True):
        assert (ours - theirs).norm() <= EXACT * (1 + theirs.norm())


class Scores(TorchDispatchMode):
    """Counts the scores that attention makes, and the largest mask that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.made = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            q, k = args[:2]
            self.made += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
            mask = (kwargs or {}).get("attn_mask")
            self.largest = max(self.largest, 0 if mask is None else mask.untyped_storage().nbytes() // mask.itemsize)
        return func(*args, **(kwargs or {}))


def scores(mask: MaskSpec | None, S: int) -> Scores:
    q, k, v = (x.float() for x in inputs(1, 2, 1, S))
    with Scores() as counted:
        attend(q, k, v, mask)
    return counted


def test_a_window_costs_twice_its_length_a_row_and_has_a_mask_of_one_block():
    S, W = 8192, 128
    counted = scores(MaskSpec(window=W), S)
    assert counted.made == 2 * (S - W) * 2 * W + 2 * W * W
    assert counted.largest == 2 * W * W
    assert scores(MaskSpec(window=W), 2 * S).made < 2.02 * counted.made


def test_packed_documents_cost_what_they_cost_alone_and_have_no_mask():
    bounds = (0, 1000, 1001, 3000, 4096)
    counted = scores(MaskSpec(documents=bounds), 4096)
    assert counted.made == 2 * (1000**2 + 1 + 1999**2 + 1096**2) and counted.largest == 0
    assert scores(MaskSpec(chunk=512), 4096).made == 2 * 4096 * 512


def test_a_block_of_a_long_window_is_shorter_than_it():
    sizes = {window: banded._rows_of_block(window) for window in (1, 64, 2047, 4096, 2**17)}
    assert sizes == {1: 64, 64: 64, 2047: 2047, 4096: 4096, 2**17: 256}


# --- what transformers asks for


def packed_of(plain: Any) -> Any:
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    documents = packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1]]))
    return and_masks(remap_positions_for_packed_sequence(plain, positions), documents)


@pytest.mark.parametrize(
    ("plain", "mask"),
    [
        (causal_mask_function, MaskSpec()),
        (sliding_window_causal_mask_function(7), MaskSpec(window=7)),
        (chunked_causal_mask_function(7, NO_PADDING), MaskSpec(chunk=7)),
        (
            and_masks(sliding_window_causal_mask_function(7), sliding_window_causal_mask_function(3)),
            MaskSpec(window=3),
        ),
    ],
)
def test_a_mask_is_read_from_its_parts_and_documents_are_not_the_shards(plain, mask):
    assert read_mask(plain) == mask
    assert read_mask(packed_of(plain), (0, 9, 20)) == MaskSpec(mask.window, mask.chunk, (0, 9, 20))


def every_other(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query - key) % 2 == 0


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        (and_masks(causal_mask_function, every_other), "every_other"),
        (or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 5))), "or_masks"),
        (bidirectional_mask_function, "bidirectional_mask_function"),
        (masking_utils.sliding_window_bidirectional_mask_function(3), "sliding_window_bidirectional_overlay"),
        (functools.partial(causal_mask_function), "partial"),
        (masking_utils.sliding_window_overlay(3), "not causal"),
    ],
)
def test_another_mask_is_refused_by_name(asked, name):
    with pytest.raises(UnsupportedModelError, match=name):
        read_mask(asked)


def asked(core: str, plain: Any, **changed: Any) -> MaskSpec | None:
    calls = ForwardContext(documents=(0, 30, 40)) if changed.pop("packed", False) else ForwardContext()
    arguments = {"q_length": 10, "kv_length": 10, "mask_function": plain} | changed
    return mask_function_for(find_backend(core), 4, calls)(**arguments)


def test_a_mask_that_hides_nothing_of_the_whole_sequence_is_none():
    windows = [asked("sdpa", sliding_window_causal_mask_function(window)) for window in (1, 11, 39, 40, 99)]
    assert windows == [MaskSpec(window=1), MaskSpec(window=11), MaskSpec(window=39), None, None]
    assert asked("sdpa", causal_mask_function) is None
    assert asked("sdpa", causal_mask_function, attention_mask=torch.ones(2, 10)) is None
    assert asked("sdpa", causal_mask_function, packed=True) == MaskSpec(documents=(0, 30, 40))
    assert asked("flash_attention_2", sliding_window_causal_mask_function(11), packed=True) is None


@pytest.mark.parametrize(
    ("core", "plain", "changed", "sentence"),
    [
        ("sdpa", causal_mask_function, {"attention_mask": torch.eye(10)}, "remove it from the batch"),
        ("sdpa", causal_mask_function, {"kv_length": 12}, "10 queries for 12 keys"),
        ("sdpa", causal_mask_function, {"q_offset": 3}, "10 queries for 10 keys"),
        ("flash_attention_2", chunked_causal_mask_function(20, NO_PADDING), {}, "40 tokens is longer than .* 20"),
    ],
)
def test_what_cannot_be_the_whole_sequences_mask_is_refused(core, plain, changed, sentence):
    with pytest.raises(UnsupportedModelError, match=sentence):
        asked(core, plain, **changed)


def test_a_version_of_transformers_whose_window_is_another_is_refused():
    def wider(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx >= q_idx - sliding_window

        return inner_mask

    window = mock.patch.object(masks, "_WINDOW", wider(1).__code__)
    causal = mock.patch.object(
        masks, "sliding_window_causal_mask_function", lambda size: and_masks(wider(size), causal_mask_function)
    )
    masks.check_parts.cache_clear()
    with window, causal, pytest.raises(UnsupportedModelError, match="installed transformers builds another mask"):
        asked("sdpa", chunked_causal_mask_function(7, NO_PADDING))


def test_a_model_that_reads_its_mask_is_refused_and_copies_and_asking_are_not():
    mask = MaskSpec(window=3)
    for reads in (lambda: mask.dtype, lambda: mask[:, 0], lambda: mask.to("cpu")):
        with pytest.raises(UnsupportedModelError, match="the model reads"):
            reads()
    assert copy.deepcopy(mask) == mask and not hasattr(mask, "shape")


# --- flex attention


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flex_attention_has_the_same_masks():
    """Its forward alone, compiled: PyTorch has no backward of it on CPU."""
    from torch._inductor import config as inductor

    q, k, v = (x.float() for x in inputs(1, 4, 2, 256, D=16, Dv=16))
    core = find_backend("flex_attention")
    with torch.no_grad(), inductor.patch(compile_threads=1):
        for mask in (MaskSpec(window=40), MaskSpec(chunk=50, documents=(0, 100, 101, 256)), MaskSpec(window=40)):
            got = core.attend(torch.nn.Module(), (q, k, v), mask, None, {})
            assert (got - attend(q, k, v, mask)).abs().max() < 1e-5


def test_stretches_run_by_flash_attention_before_cudnn_and_leave_torchs_choice_as_it_was():
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with banded._flash_first("cuda"):
        order = _cur_sdpa_kernel_backends(with_priority=True)
    assert order[0] == SDPBackend.FLASH_ATTENTION and set(order) == set(before)
    assert order.index(SDPBackend.CUDNN_ATTENTION) < order.index(SDPBackend.MATH)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
